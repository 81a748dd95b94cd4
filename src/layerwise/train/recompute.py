"""Activation checkpointing, layer by layer, as something that wraps a layer's call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from layerwise.stack.context import Around, Call, Context
from layerwise.stack.spec import indices


def recomputing(model: Any, layers: bool | Sequence[str | int]) -> dict[str, tuple[Around, ...]]:
    """The wrappers for a model's forward pass: `around`, and `source_around` for an encoder-decoder's encoder. Nothing for no layers.

    Args:
        layers: as for `Recompute`; on both sides of an encoder-decoder alike.
    """
    if not layers:
        return {}
    if getattr(model, "decoder", None) is None:
        return {"around": (Recompute(layers, model.stack.depth),)}
    return {"around": (Recompute(layers, model.decoder.depth),), "source_around": (Recompute(layers, model.stack.depth),)}


class Recompute:
    """A chosen layer keeps only its input; what it computed inside is computed again when its gradient is due.

    Stand it innermost, so that what others do around a layer happens once. Source: Chen et al. 2016, "Training Deep Nets with
    Sublinear Memory Cost", in PyTorch's non-reentrant form, which draws the same random numbers again.

    Args:
        layers: True for all, or indices and slices.
    """

    def __init__(self, layers: bool | Sequence[str | int], depth: int) -> None:
        everything = range(depth) if layers is True else ()
        chosen = everything if isinstance(layers, bool) else [i for key in layers for i in indices(key, depth)]
        self.layers = frozenset(chosen)

    def __call__(self, i: int, layer: Any, x: Tensor, ctx: Context, call: Call) -> Tensor:
        if i not in self.layers or not torch.is_grad_enabled():
            return call(x, ctx)

        def inside(x: Tensor) -> Tensor:
            # Masks, angles and a trained position bias, which layers share, are made inside the layer, so that it finds the same
            # things to do the second time.
            return call(x, dataclasses.replace(ctx, _made={}))

        result: Any = checkpoint(inside, x, use_reentrant=False)
        return result
