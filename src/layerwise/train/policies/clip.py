"""Clipping of some gradients apart from the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from layerwise.errors import BadInput
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class ClipParameters(Policy):
    """Scales the gradients of the parameters whose name ends in `name` so that their common norm is at most `norm`.

    It comes before the stage's own clipping and touches no other gradient. The default is what GPAS needs at 7B, and on Sandwich-LN at
    1B: gates clipped at 0.01. Source: Chen et al. 2025, "GPAS" (arXiv 2506.22049), and its published code.

    Args:
        name: the end of the parameters' dotted names.
        norm: their largest gradient norm.
    """

    def __init__(self, *, name: str = "gate.alpha", norm: float = 0.01) -> None:
        if norm <= 0:
            raise BadInput(f"norm must be positive; it is {norm}")
        self.name, self.norm = name, norm
        self._chosen: list[torch.nn.Parameter] = []

    def start(self, run: Run) -> None:
        self._chosen = [p for n, p in run.model.named_parameters() if n.endswith(self.name)]
        if not self._chosen:
            raise BadInput(f"clip-parameters: no parameter's name ends in '{self.name}'; gates come with stream_gate: gpas")

    def after_backward(self, run: Run) -> None:
        torch.nn.utils.clip_grad_norm_(self._chosen, self.norm)
