"""What happened to each layer of a stack: which were there at first, which an edit took out, what it cost and saved."""

from __future__ import annotations

from dataclasses import dataclass, field

from layerwise.report.read import Finished, Run
from layerwise.report.wording import size, went


@dataclass
class Cell:
    """One layer in a picture of the stack; `label` is its place in the first stack, if that is still known."""

    label: str
    gone: bool = False


@dataclass
class Moment:
    """The stack at the start or around one edit.

    Attributes:
        title: the stage's name; what: the edit.
        cells: the layers before the edit, those it removes marked; when it did more than remove, the layers after it.
        removed: their labels. before, after: layers, params, bytes.
        share: bytes after, relative to the start, in percent.
        known: whether the labels still name layers of the first stack.
    """

    title: str
    what: str
    cells: list[Cell]
    removed: list[str] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    share: float | None = None
    known: bool = True

    def counts(self) -> list[str]:
        """Layers, parameters and bytes in words, with what changed."""
        b, a = self.before, self.after
        layers = went(b.get("layers"), a.get("layers"), str).partition(", ")[0]
        words = [f"{layers} {'layer' if layers == '1' else 'layers'}"]
        if "params" in a:
            words.append(went(b.get("params"), a["params"], unit=" parameters"))
        if "bytes" in a:
            words.append(went(b.get("bytes"), a["bytes"], size))
        return words


@dataclass
class History:
    """The moments of one variant's stack; seeds with the same history share one."""

    variant: str
    seeds: list[str]
    moments: list[Moment]


def histories(run: Run) -> list[History]:
    """One history for each variant and each distinct course of events among its seeds."""
    found: list[History] = []
    for variant in run.variants:
        for seed in run.seeds:
            moments = _moments([s for s in run.stages if s.variant == variant and s.seed == seed])
            if not moments:
                continue
            same = next((h for h in found if h.variant == variant and h.moments == moments), None)
            if same is None:
                found.append(History(variant, [seed], moments))
            else:
                same.seeds.append(seed)
    return found


def depths(run: Run) -> dict[tuple[str, str, str], int]:
    """Number of layers of the model during each (variant, seed, stage), as far as the run tells."""
    known: dict[tuple[str, str, str], int] = {}
    for variant in run.variants:
        for seed in run.seeds:
            stages = [s for s in run.stages if s.variant == variant and s.seed == seed]
            first = _first(stages)
            current = first.get("layers") if first else None
            for stage in stages:
                current = (stage.after or {}).get("layers", current)
                if current is not None:
                    known[variant, seed, stage.stage] = current
    return known


def _first(stages: list[Finished]) -> dict[str, int]:
    return next((size for s in stages if (size := s.before or s.after)), {})


def _moments(stages: list[Finished]) -> list[Moment]:
    first = _first(stages)
    if not first.get("layers"):
        return []
    labels = [str(i) for i in range(first["layers"])]
    moments = [Moment("start", "", [Cell(label) for label in labels], before=first, after=first, share=100.0)]
    known = True
    for stage in stages:
        if stage.kind != "edit" or not stage.before or not stage.after:
            continue
        before, after = stage.before, stage.after
        gone = {i for i in stage.removed if isinstance(i, int) and 0 <= i < len(labels)}
        removed = [label for i, label in enumerate(labels) if i in gone]
        if len(labels) - len(gone) == after.get("layers", len(labels)):
            cells = [Cell(label, i in gone) for i, label in enumerate(labels)]
            labels = [label for i, label in enumerate(labels) if i not in gone]
        else:  # layers came or went and nobody wrote down which
            labels = [str(i) for i in range(after["layers"])]
            cells, removed, known = [Cell(label) for label in labels], [], False
        share = 100 * after["bytes"] / first["bytes"] if after.get("bytes") and first.get("bytes") else None
        moments.append(Moment(stage.stage, stage.name, cells, removed, before, after, share, known))
    return moments
