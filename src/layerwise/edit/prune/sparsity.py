"""How much of each layer goes: sparsities that follow the layers' importance, and the whole heads and channels they amount to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from layerwise.edit.prune.width import LAYER
from layerwise.stack.layer import make_layer
from layerwise.stack.spec import StackSpec

LARGEST = 0.99
EXACT = 1e-9
"""Of a share times a count, what is taken for rounding: 1 - 25 * 0.02 of 256 channels are 128."""


@dataclass(frozen=True)
class Widths:
    """What can be pruned of a stack.

    Attributes:
        groups, channels: key/value heads and inner channels that shares are taken of, layer by layer. sizes: channels of a head.
        group_weights, channel_weights: weights that go with one of them, layer by layer: rows, columns and biases along it.
    """

    groups: tuple[int, ...]
    channels: tuple[int, ...]
    sizes: tuple[int, ...]
    group_weights: tuple[int, ...]
    channel_weights: tuple[int, ...]

    def weights(self, groups: Sequence[int] | None = None, channels: Sequence[int] | None = None) -> int:
        """Prunable weights with so many heads and channels (None: all): of embeddings, norms and output biases none is."""
        return sum(
            g * a + c * b
            for g, a, c, b in zip(
                self.groups if groups is None else groups,
                self.group_weights,
                self.channels if channels is None else channels,
                self.channel_weights,
                strict=True,
            )
        )

    def lost(self, groups: Sequence[int], channels: Sequence[int], *, heads: bool = False) -> list[float]:
        """The sparsity that each layer's channels (or heads, of which only whole ones are seen) stand for."""
        pairs = zip(groups, self.groups, strict=True) if heads else zip(channels, self.channels, strict=True)
        return [1 - now / first for now, first in pairs]

    def kept(self, sparsity: Sequence[float], groups: Sequence[int], channels: Sequence[int]) -> tuple[list[int], list[int]]:
        """Heads and channels left at a sparsity of each layer, never more than there are now and never less than one.

        n = current - int(initial (1 - s)) channels go; of heads, whose channels are counted too, as many as are whole: floor(n / head_dim).
        """
        heads = [
            max(1, min(now, -(-math.floor(first * size * (1 - s) + EXACT) // size)))
            for s, first, size, now in zip(sparsity, self.groups, self.sizes, groups, strict=True)
        ]
        inner = [
            max(1, min(now, math.floor(first * (1 - s) + EXACT))) for s, first, now in zip(sparsity, self.channels, channels, strict=True)
        ]
        return heads, inner


def widths_of(stack: StackSpec, *, heads: bool = True, ffn: bool = True) -> Widths:
    """The widths of a stack's layers; what must not be pruned counts no weights."""
    specs = stack.layers
    groups, channels = tuple(s.kv_heads or s.heads for s in specs), tuple(s.ffn_width or 1 for s in specs)
    by_group, by_channel = [], []
    with torch.device("meta"):
        for spec, kv, inner in zip(specs, groups, channels, strict=True):
            layer = make_layer(spec)
            by_group.append(_along(layer, ("heads", "queries", "groups")) // kv if heads else 0)
            by_channel.append(_along(layer, ("ffn",)) // inner if ffn else 0)
    return Widths(groups, channels, tuple(s.head_dim or 1 for s in specs), tuple(by_group), tuple(by_channel))


def _along(layer: nn.Module, axes: Sequence[str]) -> int:
    """Numbers in the parameters of a layer that run along one of the axes."""
    return sum(p.numel() for name, p in layer.named_parameters() if any(a in axes for a in LAYER.get(name, ())))


def centred(scores: Sequence[float]) -> list[float]:
    """Importance of each layer with mean 0 and largest absolute value 1; all 0 where the scores are equal.

    I_i = (c_i - mean c) / max_j |c_j - mean c|. Source: Pan et al. 2025, "Adapt-Pruner" (arXiv 2502.03460), section 3.1.
    """
    mean = sum(scores) / max(len(scores), 1)
    away = [c - mean for c in scores]
    largest = max(map(abs, away), default=0.0)
    return [0.0] * len(away) if largest <= 1e-12 * max(map(abs, scores), default=0.0) else [a / largest for a in away]


def raised(sparsity: Sequence[float], importance: Sequence[float], step: float, amplitude: float) -> list[float]:
    """Sparsities after one step: s_i + step - amplitude I_i, between 0 and `LARGEST`. Source: the same."""
    return [min(max(s + step - amplitude * i, 0.0), LARGEST) for s, i in zip(sparsity, importance, strict=True)]


def advance(
    widths: Widths, groups: Sequence[int], channels: Sequence[int], sparsity: Sequence[float], importance: Sequence[float],
    step: float, amplitude: float, goal: int,
) -> tuple[list[float], list[int], list[int]]:  # fmt: skip
    """One step towards `goal` prunable weights, shortened where all of it would go below: sparsities, heads and channels after it.

    Where the amplitude holds back every layer that is not at its end yet, all of them lose alike in this step.
    """

    def after(share: float) -> tuple[list[float], list[int], list[int]]:
        s = raised(sparsity, follow, share * step, share * amplitude)
        return s, *widths.kept(s, groups, channels)

    follow = importance
    found = after(1.0)
    if not any(b > a for a, b in zip(sparsity, found[0], strict=True)):
        follow = [0.0] * len(importance)
        found = after(1.0)
    if widths.weights(found[1], found[2]) >= goal:
        return found
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if widths.weights(*after(middle)[1:]) <= goal else (middle, high)
    return after(high)


def stage_goals(first: int, last: int, stages: int) -> list[int]:
    """Weights after each of K stages of pruning, in equal parts: N_k = N_0 - (N_0 - N_K) k / K. Source: the same, section 3.2."""
    return [first - round((first - last) * k / stages) for k in range(1, stages + 1)]
