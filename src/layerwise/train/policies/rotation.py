"""How far layers turn while training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.analyze.findings import Findings, Table
from layerwise.analyze.rotation import kernels_by_depth, rotation
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class Rotation(Policy):
    """Logs how far every layer's weights have turned since the stage began, `rotation/<depth>`, and in the last step, `turn/<depth>`.

    The turn of a step is the tangent of the angle between the weights before and after it: rho, for Layca.

    Source: Carbonnelle and De Vleeschouwer 2018 (arXiv 1806.01603), see `layerwise.analyze.rotation`.
    """

    def __init__(self, *, every: int = 10) -> None:
        self.every = every
        self._start: dict[int, Tensor] = {}
        self._now: dict[int, float] = {}
        self._before: dict[int, Tensor] = {}
        self._turned = [0.0, 0]  # sum and number of single steps' turns

    def start(self, run: Run) -> None:
        self._start = kernels_by_depth(run.model)

    def _due(self, step: int, total: int) -> bool:
        return step % self.every == 0 or step == total

    def before_step(self, run: Run) -> None:
        if self._due(run.step + 1, run.total):
            self._before = kernels_by_depth(run.model)

    def after_step(self, run: Run) -> None:
        if self._due(run.step, run.total):
            for i, distance in rotation(self._before, kernels_by_depth(run.model)).items():
                turn = max(1 / max(1 - distance, 1e-9) ** 2 - 1, 0.0) ** 0.5
                self._turned = [self._turned[0] + turn, self._turned[1] + 1]
                run.log({f"turn/{i}": turn})
            self._before = {}
            self._now = rotation(self._start, kernels_by_depth(run.model))
            run.log({f"rotation/{i}": v for i, v in self._now.items()})

    def state(self) -> dict[str, Tensor]:
        return {**{str(i): w for i, w in self._start.items()}, "turned": torch.tensor(self._turned, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._turned = [state["turned"][0].item(), int(state["turned"][1])]
        self._start = {int(i): w for i, w in state.items() if i != "turned"}

    def findings(self) -> Findings:
        values = list(self._now.values()) or [0.0]
        table = Table("Rotation since the stage began", ["layer", "cosine distance"], [[i, v] for i, v in sorted(self._now.items())])
        means = {"rotation_mean": sum(values) / len(values), "rotation_min": min(values)}
        means["turn_mean"] = self._turned[0] / max(self._turned[1], 1)
        return Findings(means, [table])
