"""Giving a small model the outlier channels that large ones have, without changing what it computes."""

from __future__ import annotations

import copy
from typing import Any

import torch

from layerwise.edit.quantization.scaling import divide
from layerwise.errors import BadInput
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.stack.spec import StackSpec


@torch.no_grad()
def inject_outliers(model: Model, *, channels: int = 2, factor: float = 16.0, seed: int | None = None) -> Model:
    """The model with a few channels of what its matrices read `factor` times as large, and the columns that read them as much smaller.

    The same channels in every layer, as large models have them: the gain of a norm grows, and the columns of q, k, v or of gate, up shrink. A
    matrix that is rounded with one range a row then has columns that are small beside the others and read the largest numbers. With a
    power of two the function stays to the bit. Folding gains into matrices, with which a rotation begins, undoes it.

    Args:
        channels: how many of the stream. seed: of which.

    Source: Dettmers et al. 2022, "LLM.int8()" (arXiv 2208.07339), section 4: of large models a few channels, the same in all layers, are up to
    20 times as large as the others.
    """
    preview_outliers(model.spec, channels=channels, factor=factor)
    width = model.spec.stack.width  # type: ignore[union-attr]
    larger = torch.ones(width, dtype=torch.float64)
    larger[torch.randperm(width, generator=torch.Generator().manual_seed(seed or 0))[:channels]] = factor
    larger = larger.to(model.device)
    layers: list[Any] = [copy.deepcopy(layer) for layer in model.stack.layers]
    for side in (side for layer in layers for side in (layer.mixer, layer.ffn)):
        divide(side.norm, 1 / larger)
        for linear in (getattr(side.branch, role) for role in side.branch.reads):
            if linear is not None:
                linear.weight.div_(larger)
    return model.with_stack(model.stack.with_layers(layers))


def preview_outliers(spec: ModelSpec, *, channels: int = 2, factor: float = 16.0, **_: Any) -> ModelSpec:
    """What `inject_outliers` makes of a model's description: the same.

    Raises:
        BadInput: its matrices do not read norms of their own, or there are not so many channels.
    """
    stack = spec.stack
    if not isinstance(stack, StackSpec) or stack.shared or spec.decoder is not None:
        raise BadInput("inject-outliers needs one stack of transformer layers with weights of their own")
    if factor <= 0 or not 1 <= channels <= stack.width:
        raise BadInput(f"channels is 1 to {stack.width}, the width, and factor above 0; got {channels} and {factor}")
    for i, layer in enumerate(stack.layers):
        if layer.mixer != "attention" or layer.cross or layer.placement in ("post", "deepnorm"):
            raise BadInput(
                f"inject-outliers needs attention that reads a norm of its own; layer {i} has {layer.mixer}, placement {layer.placement}"
            )
        if other := [s.kind for s in layer.linears.values() if s.kind != "dense"]:
            raise BadInput(f"inject-outliers scales dense matrices; layer {i} has {other[0]} linears: merge them first (edit: merge)")
    return spec
