"""The search: what every choice for every layer costs and is expected to damage, and the combinations worth trying."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import nnls

from layerwise.errors import BadInput
from layerwise.plan.choice import FAMILIES, Choice, How, Plan, choices, previewed, stages
from layerwise.plan.damage import Damage, Damages
from layerwise.plan.knapsack import Front, solve
from layerwise.plan.latency import LayerLatency
from layerwise.plan.size import LayerBytes, layer_key, model_bytes

PRIOR, LEAST = 0.03, 1e-3
"""Weight of "damages simply add up" against one measured candidate, when it is found out how they do; and nats below which losses are chance."""


@dataclass
class Candidate:
    """A plan, what is expected of it and what was measured.

    Attributes:
        bytes: of the model. parts: damage by family that was expected when it was chosen. predicted: of all, as the families were then weighed.
        ms: expected latency.
        tried_by: the method that brought it up first. loss, added: on the rows that plans are chosen by; added to the model's as it is.
        held_out, held_out_by_batch: on rows that nothing was chosen by. measured_ms: latency. healed: whether it was trained before it was
            rounded and measured.
    """

    plan: Plan
    bytes: int
    parts: dict[str, float]
    predicted: float = 0.0
    ms: float | None = None
    tried_by: str = ""
    loss: float | None = None
    added: float | None = None
    held_out: float | None = None
    held_out_by_batch: list[float] = field(default_factory=list)
    measured_ms: float | None = None
    healed: bool = False

    @property
    def families(self) -> tuple[str, ...]:
        """The ways of making a model smaller that it combines."""
        return tuple(f for f in FAMILIES if any(f in c.families for c in self.plan))

    @property
    def mixed(self) -> bool:
        """Whether it combines ways of making layers smaller: the table of tokens may be rounded beside any of them."""
        return len(set(self.families) - {"tokens"}) > 1


class Space:
    """All choices of all places, with their bytes, milliseconds and, once they are known, expected damages.

    The places are the layers and, where levels has `tokens`, the table of tokens behind them.

    Attributes:
        depth, places: how many layers, and how many places.
        options: of all places; possible: whether place i can have option k. cost, ms: of place i and option k. outside, outside_ms: of what
            lies outside the places, where nothing is changed.
        parts: what the single changes of an option do, by family. joint: what an option was seen to do, NaN where it was not. excess: how
            much more than their sum the changes of an option are expected to do. weights: how much the damage of a family counts.
    """

    def __init__(
        self, spec: Any, size: LayerBytes, levels: Mapping[str, Sequence[Any]], how: How, latency: LayerLatency | None = None
    ) -> None:
        layers: Any = spec.stack.layers
        self.depth = len(layers)
        self.options = choices(levels)
        tables = np.array([o.tokens is not None for o in self.options])
        self.places = self.depth + bool(tables.any())
        self.possible = np.array([tables if i == self.depth else ~tables for i in range(self.places)])
        self.outside = model_bytes(spec, size.dtype) - sum(size(layer) for layer in layers)
        self.outside_ms = latency.outside if latency is not None else 0.0
        shape = (self.places, len(self.options))
        self.cost, self.ms, self.joint = np.zeros(shape, dtype=np.int64), np.zeros(shape), np.full(shape, np.nan)
        self.parts = np.zeros((*shape, len(FAMILIES)))
        self.excess = np.ones(len(self.options))
        self.weights = np.ones(len(FAMILIES))
        kinds = {layer_key(layer): layer for layer in layers}
        at = [list(kinds).index(layer_key(layer)) for layer in layers]
        few = dataclasses.replace(spec, stack=spec.stack.with_layers(list(kinds.values())))
        for k, option in enumerate(self.options):
            if option.tokens is not None:
                self.cost[-1, k] = model_bytes(previewed(spec, stages([option], how)), size.dtype)
            elif not option.drop:
                after: Any = previewed(few, stages([option] * len(kinds), how)).stack
                self.cost[: self.depth, k] = np.array([size(layer) for layer in after.layers])[at]
                self.ms[: self.depth, k] = np.array([latency(layer) for layer in after.layers])[at] if latency is not None else 0.0
        if tables.any():  # what the whole model has with the smallest table is what lies outside: only differences count
            least = self.cost[-1, tables].min()
            self.cost[-1, tables] -= least
            self.outside -= model_bytes(spec, size.dtype) - int(least)

    @property
    def as_is(self) -> list[int]:
        """The options that change nothing."""
        return [self.options.index(Choice(tokens=None if i < self.depth else 16)) for i in range(self.places)]

    def expect(self, found: Damages) -> None:
        """Take every choice to damage as much as its single changes do together, and a change no less than milder ones of its kind."""
        least = {change: np.max([[d.divergence for d in found[c]] for c in milder(change, found)], axis=0) for change in found}
        for k, option in enumerate(self.options):
            for f, names in enumerate(FAMILIES.values()):
                for name in set(names) & set(option.changes):
                    self.parts[:, k, f] += least[option.only(name)]

    def correct(self, chosen: Sequence[int], found: Sequence[Damage]) -> None:
        """Take notice of what the layers of a candidate do one at a time: changes of one layer need not add up.

        What was measured replaces the sum for that layer and choice. Other choices that make the same kinds of changes are expected to exceed
        their sums as those that were measured did, all together.
        """
        for i, (k, damage) in enumerate(zip(chosen, found, strict=True)):
            self.joint[i, k] = damage.divergence
        sums = self.parts.sum(axis=2)
        for kind in {o.changes for o in self.options if len(o.changes) > 1}:
            at = np.array([o.changes == kind for o in self.options])
            seen = ~np.isnan(self.joint[:, at])
            if seen.any():
                self.excess[at] = max(self.joint[:, at][seen].sum() / max(sums[:, at][seen].sum(), 1e-9), 1.0)

    def expected(self) -> np.ndarray:
        """Damage of every layer and option by family (layers, options, families)."""
        made = self.parts * self.excess[:, None]
        known = ~np.isnan(self.joint)
        changed = np.array([[f in o.families for f in FAMILIES] for o in self.options], dtype=float)
        share = changed / np.maximum(changed.sum(axis=1, keepdims=True), 1)
        left = np.where(known, self.joint - self.parts.sum(axis=2), 0.0)
        return np.where(known[:, :, None], np.maximum(self.parts + left[:, :, None] * share, 0.0), made)

    def within(self, families: Sequence[str]) -> np.ndarray:
        """Which options of every place take these ways only (places, options)."""
        return self.possible & np.array([set(o.families) <= set(families) for o in self.options])

    def candidate(self, chosen: Sequence[int], tried_by: str) -> Candidate:
        """The candidate of one option a place."""
        at = (np.arange(self.places), np.asarray(chosen))
        parts = dict(zip(FAMILIES, self.expected()[at].sum(axis=0).tolist(), strict=True))
        predicted = float(self.weights @ list(parts.values()))
        ms = self.outside_ms + float(self.ms[at].sum())
        plan = tuple(self.options[k] for k in chosen)
        return Candidate(plan, self.outside + int(self.cost[at].sum()), parts, predicted, ms, tried_by)

    def smallest(self, families: Sequence[str]) -> int:
        """Bytes of the smallest model that these ways reach, with a layer left."""
        cost = np.where(self.within(families), self.cost, np.iinfo(np.int64).max)
        kept = [k for k, o in enumerate(self.options) if not o.drop]
        least, least_kept = cost.min(axis=1), cost[: self.depth, kept].min(axis=1)
        return self.outside + int(least.sum() + (least_kept - least[: self.depth]).min())

    def best(
        self,
        families: Sequence[str],
        budget: int,
        ms: float | None = None,
        forbidden: Sequence[tuple[int, int]] = (),
    ) -> list[int] | None:
        """The options, one a place, of least expected damage within a budget of bytes (and of milliseconds), with a layer left.

        Latency is weighed into the damage, as much as is needed (a Lagrange multiplier, by bisection): what comes out is within both limits, and
        best among plans of its bytes and latency, though one between two multipliers may be passed over.

        Args:
            forbidden: places, each with an option that it may not take.
        """
        chosen = self._best(families, budget, ms, forbidden)
        if chosen is None or not all(self.options[k].drop for k in chosen[: self.depth]):
            return chosen
        with_one = [self._best(families, budget, ms, [*forbidden, (i, k)]) for i, k in enumerate(chosen[: self.depth])]
        return min((c for c in with_one if c is not None), key=self._damage, default=None)

    def _damage(self, chosen: Sequence[int]) -> float:
        """Expected of options, one a place."""
        return float((self.expected() @ self.weights)[np.arange(self.places), chosen].sum())

    def _best(self, families: Sequence[str], budget: int, ms: float | None, forbidden: Sequence[tuple[int, int]]) -> list[int] | None:
        """The same, where it may be that no layer is left."""
        damage = self.expected() @ self.weights
        damage[~self.within(families)] = np.inf
        for one in forbidden:
            damage[one] = np.inf

        def solved(price: float) -> list[int] | None:
            front: Front = solve(self.cost.tolist(), (damage + price * self.ms).tolist(), budget - self.outside)
            return front.best(budget - self.outside)

        def late(chosen: list[int] | None) -> bool:
            return chosen is not None and ms is not None and self.outside_ms + self.ms[np.arange(self.places), chosen].sum() > ms

        chosen = solved(0.0)
        if not late(chosen):
            return chosen
        low, high = 0.0, 1e-3
        while late(fast := solved(high)):
            low, high = high, 8 * high
            if high > 1e6:
                return None
        for _ in range(12):
            middle = (low * high) ** 0.5 if low else high / 8
            tried = solved(middle)
            low, high, fast = (middle, high, fast) if late(tried) else (low, middle, tried)
        return fast

    def uniform(self, names: Sequence[str], budget: int, ms: float | None = None) -> list[int] | None:
        """The same option for all layers, one that changes these fields only: of those that fit the one of least expected damage, the largest
        of equals. The table of tokens has what is best beside it."""
        alike = [
            k for k, o in enumerate(self.options) if set(o.changes) == set(names) and (len(names) < 2 or len({getattr(o, n) for n in names}) == 1)
            and o.tokens is None
        ]  # fmt: skip
        tables: list[list[int]] = [[int(t)] for t in np.flatnonzero(self.possible[-1])] if self.places > self.depth else [[]]
        every = [[*[k] * self.depth, *table] for k in alike for table in tables]
        places = np.arange(self.places)
        fitting = [
            chosen
            for chosen in every
            if self.outside + self.cost[places, chosen].sum() <= budget
            and (ms is None or self.outside_ms + self.ms[places, chosen].sum() <= ms)
        ]
        return min(fitting, key=lambda c: (self._damage(c), -int(self.cost[places, c].sum())), default=None)

    def near(self, families: Sequence[str], chosen: list[int], budget: int, count: int, **limits: Any) -> Iterator[list[int]]:
        """The best plans that differ from a best one: of those without one of its choices the `count` of least expected damage."""
        others = {
            tuple(other) for i, k in enumerate(chosen) if (other := self.best(families, budget, forbidden=[(i, k)], **limits)) is not None
        }
        yield from (list(o) for o in sorted(others, key=lambda o: (self._damage(o), o))[:count])


def milder(change: Choice, found: Damages) -> list[Choice]:
    """The changes of the same field that go no further, and it itself."""
    (name,) = change.changes
    return [c for c in found if c.changes == (name,) and getattr(c, name) >= getattr(change, name)]


def learned(measured: Sequence[Candidate]) -> np.ndarray:
    """How much the expected damage of each family counts, by what the candidates measured so far really lost.

    Damages of one family may hurt each other (two neighbouring layers dropped) or be half forgiven: weights >= 0 of least squares,
    each candidate's error relative to what it lost or was expected to lose, drawn towards 1.
    """
    rows = [(np.array(list(c.parts.values())), c.added) for c in measured if c.added is not None]
    scales = [max(parts.sum(), added, LEAST) for parts, added in rows]
    prior = PRIOR * np.eye(len(FAMILIES))
    left = np.vstack([*(parts / s for (parts, _), s in zip(rows, scales, strict=True)), prior])
    right = np.concatenate([[added / s for (_, added), s in zip(rows, scales, strict=True)], np.diag(prior)])
    return nnls(left, right)[0]


def check_reachable(space: Space, families: Sequence[str], budget: int, whole: int, ms: float | None) -> None:
    """Raises BadInput: no plan is that small, or that fast; the message says what is reachable."""
    least = space.smallest(families)
    if least > budget:
        raise BadInput(
            f"--target-size {budget / whole:.3g}: the smallest that a plan reaches is {least / whole:.3f} of the model "
            f"({least:,} of {whole:,} bytes); {space.outside:,} bytes of it are outside of the layers"
        )
    if ms is not None and space.best(families, budget, ms=ms) is None:
        allowed = np.where(space.within(families), space.ms, np.inf)
        fastest = space.outside_ms + allowed.min(axis=1).sum()
        raise BadInput(f"--target-latency {ms:g}: at that size no plan is so fast; without a layer the model takes {fastest:.3g} ms")
