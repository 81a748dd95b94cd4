"""When LoQT's adapters are merged and given new directions."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.analyze.findings import Findings
from layerwise.analyze.ledger import tensor_bytes
from layerwise.errors import BadInput
from layerwise.nn.linears.loqt import LoQT
from layerwise.train.alone import alone
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


def update_steps(total: int, gap: int, growth: float | None) -> list[int]:
    """Steps at which adapters are merged: T_0 = 0, T_1 = gap, T_{k+1} = T_k + gap + floor(growth^k); growth None: every `gap` steps."""
    steps = [0]
    while steps[-1] < total:
        k = len(steps) - 1
        steps.append(steps[-1] + gap + (int(growth**k) if growth is not None and k else 0))
    return steps[:-1] if total else []


class LoQTUpdates(Policy):
    """Merges every `loqt` linear into its frozen matrix and re-derives its factors, at growing intervals.

    The step of an update spends its data on the dense gradient of the matrices; their adapters are off, so this step's loss is
    the quantized model's, and the trained factors' gradients are zero (an optimizer's momentum still moves them a little).
    A linear is given its new factors in the backward pass, the moment its gradient is complete, so dense gradients never meet; with
    several micro-batches, or layers computed again, they wait for the end of it.
    The schedule is a function of the step, so a resumed run needs no state of it.
    Source: Loeschcke et al. 2024, "LoQT", section 3.3, algorithm 1.

    Args:
        gap: tau, steps between updates. growth: psi; gap + floor(psi^k) steps follow update k (None: always `gap`).
        compensations: rounds of error compensation.
    """

    def __init__(self, *, gap: int = 100, growth: float | None = 1.2, compensations: int = 5) -> None:
        if gap < 1 or (growth is not None and growth < 1) or compensations < 0:
            raise BadInput(f"gap >= 1, growth >= 1 and compensations >= 0; got {gap}, {growth} and {compensations}")
        self.gap, self.growth, self.compensations = gap, growth, compensations
        self._linears: list[LoQT] = []
        self._steps: set[int] = set()
        self._held = 0

    def start(self, run: Run) -> None:
        alone("the policy loqt")
        self._linears = [m for m in run.model.modules() if isinstance(m, LoQT)]
        if not self._linears:
            raise BadInput("the policy loqt merges linears of kind loqt; this model has none: set model.stack.layer.linears")
        self._steps = set(update_steps(run.total, self.gap, self.growth))

    def before_step(self, run: Run) -> None:
        if run.step in self._steps:
            for linear in self._linears:
                linear.open(partial(self._close, linear) if run.spec.accumulate == 1 else None)

    def _close(self, linear: LoQT) -> None:
        waiting = [other.opened.gradient for other in self._linears if other.opened is not None]
        matrix = linear.out_features * linear.in_features * 4  # the merged one
        self._held = max(self._held, tensor_bytes(waiting) + matrix)
        linear.close(self.compensations)

    def after_backward(self, run: Run) -> None:
        if run.step not in self._steps:
            return
        for linear in self._linears:
            if linear.opened is not None:
                self._close(linear)
            linear.free.grad = torch.zeros_like(linear.free)

    def findings(self) -> Findings:
        """The most bytes of dense gradients, and of a matrix being merged, that an update held at once."""
        return Findings({"update_bytes": float(self._held)})

    def state(self) -> dict[str, Any]:
        return {"held": torch.tensor(self._held)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._held = int(state["held"])
