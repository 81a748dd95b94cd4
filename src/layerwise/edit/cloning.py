"""A small model cut out of a larger trained one, as the start of its training."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.analyze.groups import GroupScore, group_scores
from layerwise.edit.prune.width import cut_spec, cut_width
from layerwise.errors import BadInput
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.stack.surgery import keep

Choice = Literal[GroupScore, "first"]
Blocks = Literal["ends", "first", "last"]


def subclone(
    model: Model,
    data: Any,
    *,
    depth: int | None = None,
    width: int | None = None,
    kv_heads: int | None = None,
    ffn_width: int | None = None,
    choose: Choice = "activation",
    blocks: Blocks = "ends",
    rescale: bool = True,
    samples: int = 64,
    split: str = "train",
    seed: int | None = None,
) -> Model:
    """The destination model: the most active neurons of fewer layers, with matrices rescaled for the narrower inputs.

    Args:
        depth, width, kv_heads, ffn_width: of the destination (None: the parent's). Heads keep their size, so kv_heads says how many
            remain (all heads, where none share keys).
        choose: `activation` keeps the neurons with the largest mean absolute activation, one choice for the whole residual stream and
            one a layer for heads and inner channels; any other score of `layerwise.analyze.groups` may choose instead, and `first` keeps
            the first ones, whatever they do.
        blocks: layers that are kept: the `first` ones, the `last` ones, or both `ends`, ceil(depth / 2) and floor(depth / 2), which
            takes the removed ones from the middle.
        rescale: see `layerwise.edit.prune.width.cut_width`.

    Raises:
        BadInput: the destination is larger than the parent (the edit `grow` repeats layers), or has parts that cannot be cut.

    Source: Samragh et al. 2023, "Weight subcloning: direct initialization of transformers using larger pretrained ones"
    (arXiv 2312.09299), section 3.
    """
    spec = preview_subclone(model.spec, depth=depth, width=width, kv_heads=kv_heads, ffn_width=ffn_width, blocks=blocks)
    which = kept_blocks(model.stack.depth, spec.stack.depth, blocks)
    found = None if choose == "first" else group_scores(model, data, choose, samples=samples, split=split, seed=seed or 0)
    layers: list[Any] = [model.stack.layers[i].spec for i in which]
    destination: Any = spec.stack.layers

    def top(scores: Tensor | None, have: int, want: int) -> list[int]:
        """The `want` largest of `have` neurons, in their old order."""
        return list(range(want)) if scores is None else sorted(torch.topk(scores, want).indices.tolist())

    stream = top(found.stream if found else None, model.spec.stack.width, spec.stack.width)
    groups, ffn = [], []
    for i, old, new in zip(which, layers, destination, strict=True):
        groups.append(top(found.groups[i] if found else None, old.kv_heads, new.kv_heads))
        ffn.append(top(found.ffn[i] if found else None, old.ffn_width, new.ffn_width))
    shallow = model.with_stack(keep(model.stack, which))
    return cut_width(
        shallow,
        stream=None if width is None else stream,
        groups=None if kv_heads is None else groups,
        ffn=None if ffn_width is None else ffn,
        rescale=rescale,
    )


def preview_subclone(
    spec: ModelSpec,
    *,
    depth: int | None = None,
    width: int | None = None,
    kv_heads: int | None = None,
    ffn_width: int | None = None,
    blocks: Blocks = "ends",
    rescale: bool = True,
    **_: Any,
) -> ModelSpec:
    """What `subclone` makes of a model's description."""
    have = spec.stack.depth
    depth = have if depth is None else depth
    if not 1 <= depth <= have:
        raise BadInput(f"the destination has 1 to {have} layers, the parent's; depth is {depth} (the edit grow repeats layers)")
    layers: list[Any] = [spec.stack.layers[i] for i in kept_blocks(have, depth, blocks)]
    shallow = dataclasses.replace(spec, stack=spec.stack.with_layers(layers))
    groups = None if kv_heads is None else [kv_heads] * depth
    return cut_spec(shallow, width, groups, None if ffn_width is None else [ffn_width] * depth, tied_scale=rescale)


def kept_blocks(have: int, depth: int, blocks: Blocks) -> list[int]:
    """The layers that remain of `have`."""
    low = {"ends": -(-depth // 2), "first": depth, "last": 0}[blocks]
    return [*range(low), *range(have - (depth - low), have)]
