"""Stack -> stack: which layers there are. The new stack shares the kept layers, and its spec rebuilds its shapes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from layerwise.errors import BadInput
from layerwise.stack.stack import Stack


def keep(stack: Stack, which: Sequence[int]) -> Stack:
    """Only the layers `which`, in that order (each once; `repeat` runs one twice)."""
    _check(stack, which)
    if len(set(which)) != len(which):
        raise BadInput(f"keep takes each layer once, got {list(which)}; use repeat to have a layer twice")
    return stack.with_layers([stack.layers[i] for i in which])


def insert(stack: Stack, at: int, layers: Sequence[nn.Module]) -> Stack:
    """`layers` stand before what was layer `at` (`at = depth`: on top)."""
    if not 0 <= at <= stack.depth:
        raise BadInput(f"cannot insert at {at}: the stack has layers 0 to {stack.depth - 1}")
    old = list(stack.layers)
    return stack.with_layers([*old[:at], *layers, *old[at:]])


def replace(stack: Stack, at: int, layer: nn.Module) -> Stack:
    """`layer` stands where layer `at` was."""
    _check(stack, [at])
    old = list(stack.layers)
    return stack.with_layers([*old[:at], layer, *old[at + 1 :]])


def repeat(stack: Stack, order: Sequence[int], tie: bool = False) -> Stack:
    """Layers in the order given, where one may come several times: copied, or the same weights if `tie`."""
    _check(stack, order)
    seen: set[int] = set()
    layers = []
    for i in order:
        layers.append(stack.layers[i] if tie or i not in seen else copy.deepcopy(stack.layers[i]))
        seen.add(i)
    return stack.with_layers(layers)


def _check(stack: Stack, which: Sequence[int]) -> None:
    bad = [i for i in which if not 0 <= i < stack.depth]
    if bad:
        raise BadInput(f"layer {bad[0]} is out of range: the stack has layers 0 to {stack.depth - 1}")
