"""Small classifiers on what inner layers make: companion losses, local losses, early exits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.models.heads import ClassifierHead, pool
from layerwise.models.model import Model

Read = Literal["flat", "pooled"]
"""What a read-out sees of a feature map or a sequence: all of it as one vector, or its mean."""
Tap = Literal["layer", "raw"]
"""Where it sees it: what the layer hands on, or what its (first) weight makes, before norm and ReLU."""


class AuxiliaryHeads(nn.Module):
    """One linear read-out for each of some layers: (b, ...) -> (b, classes).

    Args:
        model, batch: a classifier and a batch of at least one row, which shows how large the layers' outputs are.
        layers: whose outputs are read.
        lr_scale: of the read-outs' parameters, see `layerwise.optim.groups`.
    """

    def __init__(
        self,
        model: Model,
        batch: Mapping[str, Any],
        layers: Sequence[int],
        *,
        read: Read = "flat",
        tap: Tap = "layer",
        bias: bool = True,
        lr_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(model.head, ClassifierHead):
            raise BadInput("auxiliary classifiers need a model with a head of kind classifier: set model.head.kind")
        self.read, self.tap = read, tap
        training = model.training
        with torch.no_grad(), self.watching(model, layers) as seen:
            model.eval()(batch)
        model.train(training)
        self.out = nn.ModuleDict()
        for i in layers:
            made = nn.Linear(self._reduced(seen[i]).shape[1], model.head.out.out_features, bias=bias)
            generator = torch.Generator().manual_seed(1009 * seed + i)  # a read-out does not depend on which others there are
            bound = math.sqrt(6 / sum(made.weight.shape))  # Glorot and Bengio 2010
            nn.init.uniform_(made.weight, -bound, bound, generator=generator)
            if made.bias is not None:
                nn.init.zeros_(made.bias)
            for parameter in made.parameters():
                parameter.__dict__["lr_scale"] = lr_scale
            self.out[str(i)] = made
        self.to(model.device)

    @property
    def layers(self) -> list[int]:
        return [int(i) for i in self.out]

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """The scores of one layer's read-out."""
        return self.out[str(layer)](self._reduced(hidden))

    def squares(self, layer: int) -> Tensor:
        """||w||^2 of one read-out's weight."""
        weight: Any = self.out[str(layer)].weight
        return weight.square().sum()

    def _reduced(self, hidden: Tensor) -> Tensor:
        return hidden.flatten(1) if self.read == "flat" else pool(hidden, "mean")

    @contextlib.contextmanager
    def watching(self, model: Model, layers: Sequence[int] | None = None) -> Iterator[dict[int, Tensor]]:
        """What the layers make while the model runs inside the block, by layer, gradients included."""
        seen: dict[int, Tensor] = {}
        handles = []
        for i in self.layers if layers is None else layers:
            layer = model.stack.layers[i]
            module = getattr(layer, "weight", None) if self.tap == "raw" else layer
            if not isinstance(module, nn.Module):
                raise BadInput("tap: raw reads what a convolutional or dense layer's weight makes; these layers have none: use tap: layer")
            handles.append(module.register_forward_hook(lambda _m, _g, made, i=i: seen.__setitem__(i, made)))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def chosen_layers(model: Any, layers: Sequence[int] | None) -> list[int]:
    """The layers named (negative from the top), or all but the last, whose read-out is the model's own head.

    Raises:
        BadInput: one is not there.
    """
    depth = model.stack.depth
    if layers is None:
        return list(range(depth - 1))
    bad = [i for i in layers if not -depth <= i < depth]
    if bad:
        raise BadInput(f"layers names layer {bad[0]}; the stack has layers 0 to {depth - 1}")
    return sorted({i % depth for i in layers})
