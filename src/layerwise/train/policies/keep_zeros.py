"""Weights that are zero when a stage begins stay zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.analyze.findings import Findings, Table
from layerwise.edit.prune.magnitude import densities, zero_masks
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class KeepZeros(Policy):
    """Pruned weights get no gradient and are set back to zero after every step, whatever momentum and decay say."""

    def __init__(self) -> None:
        self._masks: dict[str, Tensor] = {}
        self._left: dict[str, tuple[int, int]] = {}

    def start(self, run: Run) -> None:
        self._masks = zero_masks(run.model)

    def after_backward(self, run: Run) -> None:
        for name, p in run.model.named_parameters():
            if name in self._masks and p.grad is not None:
                p.grad.mul_(self._masks[name])

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        for name, p in run.model.named_parameters():
            if name in self._masks:
                p.mul_(self._masks[name])

    def end(self, run: Run) -> None:
        self._left = densities(run.model)

    def state(self) -> dict[str, Tensor]:
        return {name: mask.to(torch.uint8) for name, mask in self._masks.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, mask in state.items():
            self._masks[name] = mask.bool().to(self._masks[name].device) if name in self._masks else mask.bool()

    def findings(self) -> Findings:
        kept, whole = (sum(v[i] for v in self._left.values()) for i in (0, 1))
        rows: list[list] = [[name, a, b, a / b] for name, (a, b) in self._left.items()]
        table = Table("Weights that are not zero", ["kernel", "left", "of", "share"], rows)
        return Findings({"nonzero": float(kept), "density": kept / max(whole, 1)}, [table])
