"""The stack: a list of layers, the path through them, and what wraps each call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.nn.cache import Slot
from layerwise.nn.norms import fill_norm
from layerwise.nn.positions import GridBias, RelativeBias
from layerwise.stack.around import StochasticDepth
from layerwise.stack.context import Around, Call, Context
from layerwise.stack.layer import make_final_norm, make_layer
from layerwise.stack.row_paths import run_row_paths
from layerwise.stack.spec import StackSpec


def checked_path(path: Sequence[int], depth: int) -> Sequence[int]:
    """The path, through a stack of so many layers.

    Raises:
        BadInput: it names one that is not there.
    """
    bad = [i for i in path if not 0 <= i < depth]
    if bad:
        raise BadInput(f"path {list(path)} names layer {bad[0]}; the stack has layers 0 to {depth - 1}")
    return path


class Stack(nn.Module):
    """Layers run in order, or along `ctx.path`, each call wrapped by `ctx.around`.

    Args:
        spec: a `StackSpec`, or any spec that has `layers`, `with_layers(...)` and `depth`.
        layers: ready layers that agree with `spec.layers`; None makes new ones.
    """

    def __init__(self, spec: StackSpec | Any, layers: Sequence[Any] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.layers: Any = nn.ModuleList(_made(spec) if layers is None else layers)
        self.norm = make_final_norm(spec)
        self.relative: RelativeBias | GridBias | None = None
        if isinstance(spec, StackSpec):
            biased = [s for s in spec.layers if s.position == "relative"]
            if biased:
                self.relative = RelativeBias(biased[0].heads, not biased[0].causal, spec.buckets, spec.max_distance)
            on_grid = [s for s in spec.layers if s.position == "grid_shared"]
            if on_grid and on_grid[0].grid is not None:
                self.relative = GridBias(on_grid[0].heads, on_grid[0].grid)

    @property
    def depth(self) -> int:
        return len(self.layers)

    def forward(self, x: Float[Tensor, "b s width"], ctx: Context | None = None) -> Float[Tensor, "b s width"]:
        """Run the path. A context serves one call; the cache in it serves many."""
        ctx = Context() if ctx is None else ctx
        ctx.begin(x, self.relative)
        around = ctx.around
        if self.training and any(getattr(layer.spec, "drop", 0) for layer in self.layers):
            around = (*around, StochasticDepth())
        path = range(self.depth) if ctx.path is None else ctx.path
        if len(path) and not isinstance(path[0], int):
            x = run_row_paths(partial(self._call, around=around), x, ctx, [checked_path(row, self.depth) for row in path])  # type: ignore[arg-type]
        else:
            x = self._along(x, ctx, checked_path(path, self.depth), around)  # type: ignore[arg-type]
        return x if self.norm is None else self.norm(x)

    def part(self, x: Float[Tensor, "b s width"], ctx: Context, path: Sequence[int]) -> Float[Tensor, "b s width"]:
        """Part of the way: the layers of `path` in a pass that has begun (`ctx.begin`), without the final norm."""
        return self._along(x, ctx, checked_path(path, self.depth), ctx.around)

    def _along(self, x: Tensor, ctx: Context, path: Sequence[int], around: tuple[Around, ...]) -> Tensor:
        visits: dict[int, int] = {}
        for i in path:
            slot = (i, visits.get(i, 0))
            visits[i] = slot[1] + 1
            x = self._call(slot, x, ctx, around)
        return x

    def _call(self, slot: Slot, x: Tensor, ctx: Context, around: tuple[Around, ...]) -> Tensor:
        layer = self.layers[slot[0]]
        return _wrapped(slot[0], layer, partial(layer, slot=slot), around)(x, ctx) if around else layer(x, ctx, slot)

    def initialize(self, generator: torch.Generator) -> None:
        """Fresh weights, in place, drawn from `generator`."""
        std = getattr(self.spec, "init_std", 0.02)
        write = std * (2 * max(self.depth, 1)) ** -0.5 if getattr(self.spec, "scaled_init", False) else std
        for layer in self.layers:
            layer.initialize(std, write, self.depth, generator)
        if isinstance(self.spec, StackSpec) and self.norm is not None:
            fill_norm(self.norm, 1.0)
        elif self.norm is not None:
            self.norm.initialize(generator)  # type: ignore[operator]
        if self.relative is not None:
            nn.init.normal_(self.relative.weight, std=std, generator=generator)

    def with_layers(self, layers: Sequence[Any]) -> Stack:
        """A stack of exactly these layers (shared, not copied) with this stack's final norm and, if one of them needs it, position bias.

        Raises:
            BadInput: a layer has relative positions and this stack has no bias for them.
        """
        spec = self.spec.with_layers([layer.spec for layer in layers])
        if isinstance(spec, StackSpec):
            firsts = [next(i for i, other in enumerate(layers) if other is layer) for layer in layers]
            spec = dataclasses.replace(spec, shared=tuple(firsts) if len(set(firsts)) < len(firsts) else ())
        with torch.device("meta"):
            new = Stack(spec, layers)
        new.norm = self.norm
        if new.relative is not None:
            if self.relative is None or self.relative.weight.shape != new.relative.weight.shape:
                have = "none" if self.relative is None else f"one for {self.relative.weight.shape[1]} heads"
                raise BadInput(
                    f"a layer with relative positions needs the stack's bias for {new.relative.weight.shape[1]} heads; it has {have}"
                )
            new.relative = self.relative
        return new.train(self.training)


def _made(spec: StackSpec | Any) -> list[nn.Module]:
    """New layers; those that share weights are one module that stands several times."""
    made: list[nn.Module] = []
    for i, layer in enumerate(spec.layers):
        first = spec.shared[i] if getattr(spec, "shared", ()) else i
        made.append(make_layer(layer) if first == i else made[first])
    return made


def _wrapped(i: int, layer: nn.Module, call: Call, around: Sequence[Around]) -> Call:
    for wrap in reversed(around):
        call = partial(_call, wrap, i, layer, call)
    return call


def _call(wrap: Around, i: int, layer: nn.Module, call: Call, x: Tensor, ctx: Context) -> Tensor:
    return wrap(i, layer, x, ctx, call)
