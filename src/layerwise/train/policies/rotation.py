"""How far layers turn while training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from layerwise.analyze.findings import Findings, Table
from layerwise.analyze.rotation import kernels_by_depth, rotation
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class Rotation(Policy):
    """Logs how far every layer's weights have turned since the stage began, `rotation/<depth>`.

    Source: Carbonnelle and De Vleeschouwer 2018 (arXiv 1806.01603), see `layerwise.analyze.rotation`.
    """

    def __init__(self, *, every: int = 10) -> None:
        self.every = every
        self._start: dict[int, Tensor] = {}
        self._now: dict[int, float] = {}

    def start(self, run: Run) -> None:
        self._start = kernels_by_depth(run.model)

    def after_step(self, run: Run) -> None:
        if run.step % self.every == 0 or run.step == run.total:
            self._now = rotation(self._start, kernels_by_depth(run.model))
            run.log({f"rotation/{i}": v for i, v in self._now.items()})

    def state(self) -> dict[str, Tensor]:
        return {str(i): w for i, w in self._start.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._start = {int(i): w for i, w in state.items()}

    def findings(self) -> Findings:
        values = list(self._now.values()) or [0.0]
        table = Table("Rotation since the stage began", ["layer", "cosine distance"], [[i, v] for i, v in sorted(self._now.items())])
        return Findings({"rotation_mean": sum(values) / len(values), "rotation_min": min(values)}, [table])
