"""Growing a stack in depth: which old layer each new one comes from, and what it begins as.

An operator is an index map: entry t is the old layer that layer t of the deeper stack copies, or None for a fresh one. Maps of
4 layers grown to 7:

| where        | map                | source |
|--------------|--------------------|--------|
| `interpolate` | 0 0 1 1 2 2 3     | floor(t n / m); Pan et al. 2024, "Preparing Lessons for Progressive Training", section 3 |
| `stack`      | 0 1 2 3 1 2 3      | the whole stack again on top; a part of it is its upper part; Gong et al. 2019, "Efficient Training of BERT by Progressively Stacking" |
| `top`        | 0 1 2 3 3 3 3      | the last layer again |
| `middle`     | 0 0 1 1 2 2 3      | the middle layers twice, first and last ones once (as long as m <= 2 n) |
| `append`     | 0 1 2 3 - - -      | fresh layers on top |
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.nn.norms import fill_norm
from layerwise.stack.layer import make_layer
from layerwise.stack.spec import StackSpec
from layerwise.stack.stack import Stack

Where = Literal["interpolate", "stack", "top", "middle", "append"]
Sources = list[int | None]


def sources(old: int, new: int, where: Where) -> Sources:
    """The index map that grows `old` layers to `new`.

    Raises:
        BadInput: there is nothing to copy from, or the new stack is not deeper.
    """
    if new < old or old < 1:
        raise BadInput(f"growing needs at least one layer and a greater depth; the stack has {old}, depth is {new}")
    if where == "interpolate":
        return [t * old // new for t in range(new)]
    if where == "stack":
        rest = new % old
        return [*list(range(old)) * (new // old), *range(old - rest, old)]
    if where == "top":
        return [min(t, old - 1) for t in range(new)]
    if where == "append":
        return [t if t < old else None for t in range(new)]
    if new > 2 * old:
        raise BadInput(f"where: middle repeats each layer once at most, up to depth {2 * old}; depth is {new}")
    first = (old - (new - old)) // 2
    twice = range(first, first + new - old)
    return [i for i in range(old) for _ in range(2 if i in twice else 1)]


def grow(
    model: Model,
    *,
    depth: int | None = None,
    where: Where = "interpolate",
    order: Sequence[int | None] | None = None,
    silent: bool = False,
    seed: int | None = None,
) -> Model:
    """A deeper model whose layers come from the given one's; embedding, final norm and head are shared.

    The first layer made from an old one is that layer (shared, not copied); further ones are copies of it, free to part from it in
    training. Fresh layers are like the top layer, with initial weights.

    Args:
        depth: of the new stack, grown by the operator `where` (see the module).
        order: the index map itself, instead of depth and where: `[0, 1, 1, 2]` repeats layer 1, null stands for a fresh layer.
        silent: copies and fresh layers begin by adding nothing to the stream, so that the model's outputs stay exactly the same.
            Source: Wu et al. 2024, "LLaMA Pro", section 3.2.

    Raises:
        BadInput: neither or both of depth and order; an old layer left out or out of order, so that outputs could not be kept while
            `silent`; layers whose norms stand after the sum, which cannot be silent.
    """
    spec = preview_grow(model.spec, depth=depth, where=where, order=order, silent=silent)
    generator = torch.Generator(device=model.device).manual_seed(seed or 0)
    seen: set[int] = set()
    layers: list[Any] = []
    for source in _map(model.stack.depth, depth, where, order):
        if source is not None and source not in seen:
            seen.add(source)
            layers.append(model.stack.layers[source])
            continue
        made = copy.deepcopy(model.stack.layers[source]) if source is not None else _fresh(model.stack, spec.stack.depth, generator)
        layers.append(silenced(made) if silent else made)
    return model.with_stack(model.stack.with_layers(layers))


def preview_grow(
    spec: ModelSpec,
    *,
    depth: int | None = None,
    where: Where = "interpolate",
    order: Sequence[int | None] | None = None,
    silent: bool = False,
    **_: Any,
) -> ModelSpec:
    """What `grow` makes of a model's description."""
    old = spec.stack.layers
    chosen = _map(len(old), depth, where, order)
    if silent:
        if not isinstance(spec.stack, StackSpec) or any(s.placement in ("post", "deepnorm") for s in spec.stack.layers):
            raise BadInput("silent needs layers that add to the stream: of placement pre, lns or sandwich")
        if any(s.residual_gain or s.stream_gate for s in spec.stack.layers):
            raise BadInput("silent layers leave the stream as it is; gates and gains on the stream (stream_gate, residual_gain) would not")
        first = list(dict.fromkeys(s for s in chosen if s is not None))
        if first != list(range(len(old))):
            raise BadInput(f"silent keeps the model's outputs, so every old layer must come once in its order; the map is {chosen}")
    if None in chosen and not old:
        raise BadInput("a fresh layer is like the top layer, and the stack has none")
    layers: list[Any] = [old[-1 if source is None else source] for source in chosen]
    return dataclasses.replace(spec, stack=spec.stack.with_layers(layers))


def silenced(layer: nn.Module) -> nn.Module:
    """The layer itself, adding nothing to the stream: what each branch writes is zero (its output norm's gain, where it has one).

    Raises:
        BadInput: a matrix of a kind that cannot be zero.
    """
    for name in ("mixer", "cross", "ffn"):
        branch: Any = getattr(layer, name)
        if branch is None:
            continue
        if branch.norm_out is not None:
            fill_norm(branch.norm_out, 0.0)
            continue
        for linear in (getattr(branch.branch, w) for w in branch.branch.writes):
            linear.initialize(0.0, torch.Generator(device=next(linear.parameters()).device))
            if linear.materialize().any():
                raise BadInput(f"a linear of kind {type(linear).__name__} cannot begin at zero: grow without silent")
    return layer


@torch.no_grad()
def spread(layers: Sequence[nn.Module], old: int, new: int, where: Where) -> None:
    """Grow in place inside a stack that has room: the first `new` layers take the values of the first `old`, by the operator's map.

    From the top down, so that no layer is overwritten before it is copied from; `append` leaves the upper ones as they are.
    """
    chosen = sources(old, new, where)
    for target in reversed(range(new)):
        source = chosen[target]
        if source is None or source == target:
            continue
        given: dict[str, Tensor] = dict(layers[source].named_parameters())
        for name, parameter in layers[target].named_parameters():
            parameter.copy_(given[name])


def _map(old: int, depth: int | None, where: Where, order: Sequence[int | None] | None) -> Sources:
    if (depth is None) == (order is None):
        raise BadInput("grow needs either depth or order")
    if order is None:
        assert depth is not None
        return sources(old, depth, where)
    bad = [i for i in order if i is not None and not 0 <= i < old]
    if bad or not order:
        raise BadInput(f"order names layers 0 to {old - 1} or null; got {list(order)}")
    return list(order)


def _fresh(stack: Stack, depth: int, generator: torch.Generator) -> nn.Module:
    """A new layer like the top one, with the initial weights it would have in a stack of `depth`."""
    top = stack.layers[-1]
    parameter = next(top.parameters())
    made: Any = make_layer(top.spec).to(device=parameter.device, dtype=parameter.dtype)
    std = getattr(stack.spec, "init_std", 0.02)
    made.initialize(std, std * (2 * depth) ** -0.5 if getattr(stack.spec, "scaled_init", False) else std, depth, generator)
    return made.train(stack.training)
