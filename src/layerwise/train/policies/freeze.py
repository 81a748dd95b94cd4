"""Layers that a stage does not train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from layerwise.stack.depth import depth_of, view
from layerwise.stack.spec import indices
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class Freeze(Policy):
    """Layers that are not trained in this stage; they are as trainable as before afterwards.

    Args:
        layers: indices or slices; embedding, head: freeze what lies before or after the layers too.
    """

    def __init__(self, *, layers: Sequence[str | int] = (), embedding: bool = False, head: bool = False) -> None:
        self.layers, self.embedding, self.head = layers, embedding, head
        self._frozen: list[torch.nn.Parameter] = []

    def start(self, run: Run) -> None:
        depth = view(run.model).depth
        chosen = {i for key in self.layers for i in indices(key, depth)}
        chosen |= {-1} if self.embedding else set()
        chosen |= {depth} if self.head else set()
        depths = depth_of(run.model)
        self._frozen = [p for n, p in run.model.named_parameters() if depths[n] in chosen and p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def end(self, run: Run) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
