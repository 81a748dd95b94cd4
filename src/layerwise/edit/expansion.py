"""Block expansion: new layers among trained ones, for a stage that trains these alone or all together."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from layerwise.analyze.scores import By, layer_order
from layerwise.edit.growth import preview_grow, silenced
from layerwise.edit.merging.spherical import slerp
from layerwise.errors import BadInput
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.nn.linear import Linear
from layerwise.stack.spec import StackSpec

Choose = Literal["least", "most", "interleave"]
Start = Literal["identity", "copy", "random", "linear", "slerp"]


def expand(
    model: Model,
    data: Any = None,
    *,
    count: int | None = None,
    choose: Choose = "interleave",
    by: By = "layer-drop",
    layers: Sequence[int] | None = None,
    start: Start = "identity",
    samples: int = 128,
    split: str = "train",
    seed: int | None = None,
) -> Model:
    """A deeper model with a new layer directly behind each of some layers; everything that was there is shared.

    New layers are marked `added` in their description, so that the policy `freeze` can train them alone.

    Args:
        count: of new layers, behind the layers that `choose` names: those that matter `least` or `most` by the score `by`, or the last
            of each of `count` equal groups (`interleave`). 0 gives the model back.
        layers: or these; one that is named twice gets two new layers.
        start: what a new layer begins as. `identity`: a copy that adds nothing to the stream, so that the model's outputs stay exactly
            the same; `copy`; `random`: matrices by Glorot and Bengio 2010, normal; `linear`, `slerp`: halfway between the layer and
            the one below it (the lowest layer: a copy).
        by, samples, split: see `layerwise.analyze.scores`; `layer-drop` is the loss that skipping a layer adds.
        seed: of `random`.

    Raises:
        BadInput: neither or both of count and layers; more new layers than there are layers; `identity` in layers that cannot be silent;
            a layer to be merged with one of another shape.

    Source: Wu et al. 2024, "LLaMA Pro", section 3.2 (interleaved identity copies); Zhang et al. 2025, "ADEPT" (arXiv 2510.10071), section 3.1
    (the least important layers by loss); Tan et al. 2024, "DLO" (arXiv 2407.11030) and its published code (where a new layer begins).
    """
    preview_expand(model.spec, count=count, choose=choose, layers=layers, start=start)
    if not (layers or count):
        return model
    depth, old = model.stack.depth, model.stack.layers
    if layers is None and choose == "interleave":
        layers = interleaved(depth, count or 0)
    elif layers is None:
        order = layer_order(model, data, by, reverse=choose == "least", samples=samples, split=split, seed=seed or 0)
        layers = order[:count]
    generator = torch.Generator(device=model.device).manual_seed(seed or 0)
    copies = Counter(layers)
    stack: list[Any] = []
    for i in range(depth):
        made = [_made(old[i], old[i - 1] if i else None, start, depth, generator) for _ in range(copies[i])]
        stack += [old[i], *made]
    return model.with_stack(model.stack.with_layers(stack))


def preview_expand(
    spec: ModelSpec,
    *,
    count: int | None = None,
    choose: Choose = "interleave",
    layers: Sequence[int] | None = None,
    start: Start = "identity",
    **_: Any,
) -> ModelSpec:
    """What `expand` makes of a model's description (where a score chooses: one of the right depth)."""
    old = spec.stack.layers
    if not isinstance(spec.stack, StackSpec) or (count is None) == (layers is None):
        raise BadInput("expand needs a stack of transformer layers, and either count or layers")
    if layers is None:
        assert count is not None
        if not 0 <= count <= len(old):
            raise BadInput(f"count is 0 to {len(old)}, one new layer behind each at most; it is {count}")
        chosen = interleaved(len(old), count) if choose == "interleave" else list(range(count))
    else:
        chosen = list(layers)
    if not chosen:
        return spec
    bad = [i for i in chosen if not 0 <= i < len(old)]
    if bad:
        raise BadInput(f"cannot put a layer behind layer {bad[0]}: the stack has layers 0 to {len(old) - 1}")
    if start in ("linear", "slerp") and (odd := next((i for i in chosen if i and not _alike(old[i], old[i - 1])), None)):
        raise BadInput(f"start: {start} mixes layer {odd} with the one below it, and they are described differently")
    order = [i for i in range(len(old)) for _ in range(1 + chosen.count(i))]
    made = preview_grow(spec, order=order, silent=start == "identity")
    layers_there: Any = made.stack.layers
    marked = [dataclasses.replace(s, added=True) if t and order[t - 1] == order[t] else s for t, s in enumerate(layers_there)]
    return dataclasses.replace(made, stack=spec.stack.with_layers(marked))


def interleaved(depth: int, count: int) -> list[int]:
    """The last layer of each of `count` equal groups: 32 layers and 8 give 3, 7, ..., 31.

    Raises:
        BadInput: the groups would not be equal.
    """
    if count and depth % count:
        raise BadInput(f"interleave puts one new layer behind each of {count} equal groups, and {depth} layers have none: name layers")
    return [(group + 1) * (depth // count) - 1 for group in range(count)]


def _alike(a: Any, b: Any) -> bool:
    return dataclasses.replace(a, added=False, norm_gain=1.0) == dataclasses.replace(b, added=False, norm_gain=1.0)


def _made(layer: nn.Module, below: nn.Module | None, start: Start, depth: int, generator: torch.Generator) -> Any:
    made: Any = copy.deepcopy(layer)
    made.spec = dataclasses.replace(made.spec, added=True)
    if start == "identity":
        return silenced(made)
    if start == "random":
        made.initialize(0.02, 0.02, depth, generator)
        for linear in (m for m in made.modules() if isinstance(m, Linear)):
            linear.initialize((2 / (linear.in_features + linear.out_features)) ** 0.5, generator)
    elif start in ("linear", "slerp") and below is not None:
        others = dict(below.named_parameters())
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.copy_(torch.lerp(parameter, others[name], 0.5) if start == "linear" else slerp(parameter, others[name]))
    return made
