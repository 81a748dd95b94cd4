"""The gradient norm of every layer while training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.analyze.findings import Findings, Table
from layerwise.analyze.gradients import depth_gradient_norms, variation
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class GradientNorms(Policy):
    """Logs the gradient norm of every depth, `grad_norm/<depth>`, and leaves first and last values as a table."""

    def __init__(self, *, every: int = 10) -> None:
        self.every = every
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}

    def after_backward(self, run: Run) -> None:
        if (run.step + 1) % self.every == 0 or run.step in (0, run.total - 1):
            self._last = depth_gradient_norms(run.model)
            self._first = self._first or self._last
            run.log({f"grad_norm/{i}": v for i, v in self._last.items()})

    def state(self) -> dict[str, Tensor]:
        return {f"{i}": torch.tensor([v, self._last.get(i, v)], dtype=torch.float64) for i, v in self._first.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._first = {int(i): v[0].item() for i, v in state.items()}
        self._last = {int(i): v[1].item() for i, v in state.items()}

    def findings(self) -> Findings:
        rows: list[list] = [[i, self._first[i], self._last[i]] for i in sorted(self._first)]
        inner = [v for i, v in self._last.items() if 0 <= i < max(self._last)]
        table = Table("Gradient norm by layer", ["layer", "first step", "last step"], rows)
        return Findings({"grad_norm_variation": variation(inner)}, [table])
