"""One choice for every layer, so that the damage is least for the bytes: the multiple-choice knapsack, solved exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STATES = 4000
"""Most partial sums that are carried from layer to layer. More are thinned evenly over the bytes, and the result is then only nearly best."""


@dataclass(frozen=True)
class Front:
    """Every sum of bytes at which the least damage falls, rising in bytes and falling in damage.

    Attributes:
        cost, damage: of the whole stack. steps: of each layer, where a state came from and by which choice.
    """

    cost: np.ndarray
    damage: np.ndarray
    steps: tuple[tuple[np.ndarray, np.ndarray], ...]

    def best(self, budget: int) -> list[int] | None:
        """The number of the choice of every layer that damages least within a budget; None where nothing is so small."""
        state = int(np.searchsorted(self.cost, budget, side="right")) - 1
        if state < 0:
            return None
        chosen = []
        for parents, options in reversed(self.steps):
            chosen.append(int(options[state]))
            state = int(parents[state])
        return chosen[::-1]


def solve(costs: Sequence[Sequence[int]], damages: Sequence[Sequence[float]], most: int | None = None, *, states: int = STATES) -> Front:
    """The front over all combinations of one choice a layer, costs and damages added up over layers.

    Partial sums that another one beats in both are dropped (Nemhauser and Ullmann 1969, "Discrete Dynamic Programming and Capital
    Allocation"), which loses nothing.

    Args:
        costs, damages: of every layer, of each of its choices (infinite damage: not allowed).
        most: no more than this is ever asked for.
    """
    cheapest = [min((c for c, d in zip(*both, strict=True) if d < np.inf), default=0) for both in zip(costs, damages, strict=True)]
    rest = sum(cheapest)
    cost, damage = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps = []
    for layer_cost, layer_damage, least in zip(costs, damages, cheapest, strict=True):
        rest -= least
        options = _unbeaten(np.asarray(layer_cost, dtype=np.int64), np.asarray(layer_damage, dtype=float))
        sums = (cost[:, None] + np.asarray(layer_cost, dtype=np.int64)[options]).ravel()
        losses = (damage[:, None] + np.asarray(layer_damage, dtype=float)[options]).ravel()
        order = _unbeaten(sums, np.where(sums + rest <= (np.iinfo(np.int64).max if most is None else most), losses, np.inf))
        order = _thinned(order, sums, states)
        steps.append((order // len(options), options[order % len(options)]))
        cost, damage = sums[order], losses[order]
    return Front(cost, damage, tuple(steps))


def _unbeaten(cost: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """Which have less damage than all that cost as much or less, by rising cost."""
    order = np.lexsort((damage, cost))
    before = np.concatenate([[np.inf], np.minimum.accumulate(damage[order])])[:-1]
    return order[damage[order] < before]


def _thinned(order: np.ndarray, sums: np.ndarray, states: int) -> np.ndarray:
    """At most about `states` of the states: of each stretch of bytes the largest, and the smallest of all."""
    if len(order) <= states:
        return order
    cost = sums[order].astype(float)
    stretch = np.minimum((cost - cost[0]) / max(cost[-1] - cost[0], 1) * states, states - 1).astype(int)
    last = np.append(np.flatnonzero(np.diff(stretch)), len(order) - 1)
    return order[np.union1d([0], last)]
