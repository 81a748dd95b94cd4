"""Making candidates and measuring them: each single method at its best, combinations of all of them, and what is best at a size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerwise.edit.drop import choose_block
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model
from layerwise.nn.linears.factors import Kept
from layerwise.plan.choice import Choice, How, Plan, Train, applied, stages
from layerwise.plan.damage import Probe
from layerwise.plan.latency import Work, milliseconds
from layerwise.plan.measure import Measure, Target
from layerwise.plan.search import Candidate, Space, learned

METHODS = {"drop": "layers dropped", "width": "width", "rank": "low rank", "bits": "bits per layer"}
EVENLY: dict[str, list[list[str]]] = {"drop": [], "width": [["ffn"], ["heads", "ffn"]], "rank": [["rank"]], "bits": [["bits"]]}
"""Fields of a choice that a method may set alike for all layers."""
UNIFORM, COMBINED = "bits, uniform", "combination"


@dataclass
class Best:
    """The best of one target.

    Attributes:
        target: share of the model's bytes. budget: bytes. ms: milliseconds allowed. methods: the best candidate of every method; None:
            it cannot make the model so small (or fast). plan: the best of all.
    """

    target: float
    budget: int
    ms: float | None
    methods: dict[str, Candidate | None]
    plan: Candidate

    @property
    def rival(self) -> tuple[str, Candidate] | None:
        """The best single method, by the rows that plans are chosen by."""
        single = {n: c for n, c in self.methods.items() if c is not None and n != COMBINED}
        return min(single.items(), key=lambda item: item[1].loss or 0.0) if single else None


class Trials:
    """Candidates of one model; each is made and measured once.

    Args:
        rows, batch: how many rows of validation and of test text, and how many at a time.
        between, train: stages that heal a candidate before it is rounded, and what does those of them that train.
        kept: what matrices were decomposed into when single changes were made.
    """

    def __init__(
        self,
        model: Model,
        data: Any,
        measure: Measure,
        space: Space,
        probe: Probe,
        how: How,
        *,
        rows: int = 256,
        batch: int = 16,
        seed: int = 0,
        work: Work | None = None,
        between: Mapping[str, dict[str, Any]] | None = None,
        train: Train | None = None,
        kept: Kept | None = None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.model, self.data, self.measure, self.space, self.probe, self.how, self.seed = model, data, measure, space, probe, how, seed
        self.rows, self.batch, self.work, self.say = rows, batch, work, say
        self.between, self.train, self.kept = between, train, kept
        self._targets: dict[str, list[Target]] = {}
        self.whole = mean(self.losses(model, "validation"))
        self.tried: dict[tuple[int, ...], Candidate] = {}
        self._healed: dict[Plan, Candidate] = {}

    def make(self, candidate: Candidate) -> Model:
        """The model that a candidate describes, by the very edits that its job has."""
        # Behind layers that are gone or cut, matrices read other inputs: what they are decomposed into serves no other candidate.
        kept = self.kept if {"drop", "width"}.isdisjoint(candidate.families) else None
        return applied(self.model, self.data, self.stages(candidate), self.seed, self.train, kept)

    def stages(self, candidate: Candidate) -> dict[str, dict[str, Any]]:
        """What a candidate's job does."""
        return stages(candidate.plan, self.how, self.between if candidate.healed else None)

    def losses(self, model: Model, split: str) -> list[tuple[float, int]]:
        """Summed loss of every batch of a split, and of how many tokens or texts."""
        if split not in self._targets:
            rows = batches(split_of(self.data, split), self.batch, -(-self.rows // self.batch), self.model.device)
            self._targets[split] = list(self.measure.targets(rows))
        with inference(model):
            return [(target.loss(model(target.rows)), target.count) for target in self._targets[split]]

    def measured(self, chosen: Sequence[int] | None, tried_by: str) -> Candidate | None:
        """The candidate of these options, with its loss on validation rows."""
        if chosen is None:
            return None
        key = tuple(chosen)
        if key not in self.tried:
            self.tried[key] = made = self.space.candidate(chosen, tried_by)
            model = self.make(made)
            made.loss = mean(self.losses(model, "validation"))
            made.added = made.loss - self.whole
            layers = iter(model.eval().stack.layers)
            alone = self.probe.of([None if c.drop else next(layers) for c in made.plan[: self.space.depth]])
            table = [self.probe.of_embedding(model)] if self.space.places > self.space.depth else []
            self.space.correct(chosen, [*alone, *table])
            self.say(f"tried {tried_by}: {made.bytes:,} bytes, loss {made.loss:.4f}, expected {self.whole + made.predicted:.4f}")
        return self.tried[key]

    def healed(self, candidate: Candidate) -> Candidate:
        """The same plan, trained for a while before it is rounded, and measured anew on all rows."""
        if candidate.plan not in self._healed:
            self._healed[candidate.plan] = made = dataclasses.replace(candidate, healed=True, held_out=None, measured_ms=None)
            model = self.make(made)
            made.loss = mean(self.losses(model, "validation"))
            made.added = made.loss - self.whole
            self._hold_out(made, model)
            self.say(f"healed {made.tried_by}: {made.bytes:,} bytes, loss {made.loss:.4f}")
        return self._healed[candidate.plan]

    def heal(self, best: Best) -> Best:
        """The best of every method after healing, and the best of these."""
        methods = {name: None if c is None else self.healed(c) for name, c in best.methods.items()}
        return dataclasses.replace(best, methods=methods, plan=min((c for c in methods.values() if c is not None), key=_rank))

    def hold_out(self, candidate: Candidate) -> None:
        """Measure a candidate on rows that nothing was chosen by, once."""
        if candidate.held_out is None:
            self._hold_out(candidate, self.make(candidate))

    def _hold_out(self, candidate: Candidate, model: Model) -> None:
        found = self.losses(model, "test")
        candidate.held_out = mean(found)
        candidate.held_out_by_batch = [total / count for total, count in found]
        if self.work is not None:
            candidate.measured_ms = milliseconds(model, self.work)

    def best(self, target: float, budget: int, families: Sequence[str], *, ms: float | None = None, tries: int = 6) -> Best:
        """Every single method with as many tries as their combination, and the best of all.

        A single method tries the same for all layers, then what should damage least, then plans near it; the table of tokens, which is no layer,
        may be rounded beside each. Combinations first try the best of
        all families, and the best without each of those that it took; what these did says how far damages add up, and the next are
        the best by that.
        """
        methods: dict[str, Candidate | None] = {}
        limits: dict[str, Any] = {"ms": ms}
        beside = [family for family in families if family not in METHODS]
        for family in families:
            if family in METHODS:
                found = self._single(family, beside, budget, limits, tries)
                methods[METHODS[family]] = min(found, key=_loss) if found else None
        if "bits" in families:
            methods[UNIFORM] = self.measured(self.space.uniform(["bits"], budget, ms), UNIFORM)
        mixed = self._combined(families, budget, limits, tries)
        methods[COMBINED] = min(mixed, key=_loss) if mixed else None
        return Best(target, budget, ms, methods, min((c for c in methods.values() if c is not None), key=_rank))

    def _single(self, family: str, beside: list[str], budget: int, limits: dict[str, Any], tries: int) -> list[Candidate]:
        name, found = METHODS[family], list[Candidate]()
        for fields in EVENLY[family]:
            self._try(self.space.uniform(fields, budget, limits["ms"]), name, found)
        chosen = self.space.best([family, *beside], budget, **limits)
        self._try(chosen, name, found)
        if chosen is not None and family == "drop":
            self._try(self._block(chosen), name, found)
        if chosen is not None:
            for other in self.space.near([family, *beside], chosen, budget, tries, **limits):
                if len(found) < tries:
                    self._try(other, name, found)
        return found

    def _combined(self, families: Sequence[str], budget: int, limits: dict[str, Any], tries: int) -> list[Candidate]:
        found: list[Candidate] = []
        chosen = self.space.best(families, budget, **limits)
        self._try(chosen, COMBINED, found)
        for family in found[0].families if found else ():
            others = [f for f in families if f != family]
            if len(others) > 1 and len(found) < tries:
                self._try(self.space.best(others, budget, **limits), COMBINED, found)
        while len(found) < tries:
            self.space.weights = learned(list(self.tried.values()))
            chosen = self.space.best(families, budget, **limits)
            if not self._try(chosen, COMBINED, found):
                break
        if chosen is not None and len(found) < tries:
            for other in self.space.near(families, chosen, budget, tries, **limits):
                if len(found) < tries:
                    self._try(other, COMBINED, found)
        return [c for c in found if c.mixed]

    def _try(self, chosen: Sequence[int] | None, name: str, found: list[Candidate]) -> bool:
        """Measure it, unless it is among the found; whether it was new to them."""
        made = self.measured(chosen, name)
        if made is None or made in found:
            return False
        found.append(made)
        return True

    def _block(self, chosen: Sequence[int]) -> list[int]:
        """As many layers as these options drop: the block of neighbours over which the stream turns least."""
        count = sum(self.space.options[k].drop for k in chosen)
        gone = set(choose_block(self.model, self.data, count=count, samples=self.how.samples))
        dropped = self.space.options.index(Choice(drop=True))
        return [dropped if i in gone else k for i, k in enumerate(self.space.as_is[: self.space.depth])] + list(chosen[self.space.depth :])

    def front(self) -> list[Candidate]:
        """The candidates (healed ones, where that was done) that no other one beats both in bytes and in loss, the smallest first."""
        kept: list[Candidate] = []
        for candidate in sorted((self._healed.values() or self.tried.values()), key=lambda c: (c.bytes, _loss(c))):
            if not kept or _loss(candidate) < _loss(kept[-1]):
                kept.append(candidate)
        return kept


def mean(found: Sequence[tuple[float, int]]) -> float:
    """Of one token, or text."""
    return sum(total for total, _ in found) / sum(count for _, count in found)


def _rank(candidate: Candidate) -> tuple[float, int]:
    """By loss, and of equals the simpler one first."""
    return _loss(candidate), len(candidate.families)


def _loss(candidate: Candidate) -> float:
    assert candidate.loss is not None
    return candidate.loss
