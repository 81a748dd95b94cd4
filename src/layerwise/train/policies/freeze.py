"""Layers that a stage does not train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from layerwise.analyze.findings import Findings
from layerwise.errors import BadInput
from layerwise.stack.depth import depth_of, view
from layerwise.stack.spec import indices
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class Freeze(Policy):
    """Layers that are not trained in this stage; they are as trainable as before afterwards.

    Args:
        layers: indices or slices; embedding, head: freeze what lies before or after the layers too.
        all_but_added: freeze everything but the layers that an edit has put in (`expand`).

    Metrics: `trained_share`, of all parameters those that are trained.
    """

    def __init__(
        self, *, layers: Sequence[str | int] = (), embedding: bool = False, head: bool = False, all_but_added: bool = False
    ) -> None:
        self.layers, self.embedding, self.head, self.all_but_added = layers, embedding, head, all_but_added
        self._frozen: list[torch.nn.Parameter] = []
        self._share = 1.0

    def meets(self, spec: Any) -> None:
        """Refuse a model in which nothing would be left to train."""
        if self.all_but_added and not any(getattr(layer, "added", False) for layer in spec.stack.layers):
            raise BadInput("all_but_added trains the layers that an edit has added, and this model has none: expand it first")

    def start(self, run: Run) -> None:
        depth = view(run.model).depth
        chosen = {i for key in self.layers for i in indices(key, depth)}
        chosen |= {-1} if self.embedding else set()
        chosen |= {depth} if self.head else set()
        if self.all_but_added:
            self.meets(run.model.spec)
            chosen |= set(range(-1, depth + 1)) - {i for i, layer in enumerate(run.model.stack.layers) if layer.spec.added}
        depths = depth_of(run.model)
        self._frozen = [p for n, p in run.model.named_parameters() if depths[n] in chosen and p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        counts = [(p.numel(), p.requires_grad) for p in run.model.parameters()]
        self._share = sum(n for n, trained in counts if trained) / sum(n for n, _ in counts)

    def end(self, run: Run) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)

    def findings(self) -> Findings:
        return Findings({"trained_share": self._share})
