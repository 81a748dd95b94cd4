"""What may become of a layer, and the edits that make it so: a plan is an ordinary list of edits."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from layerwise.edit import EDITS, PREVIEWS
from layerwise.errors import BadInput
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.nn.linears.factors import Kept
from layerwise.plan.measure import check_measurable
from layerwise.table import lookup

FAMILIES = {"drop": ("drop",), "width": ("heads", "ffn"), "rank": ("rank",), "bits": ("bits",), "tokens": ("tokens",)}
"""Ways of making a model smaller, and the fields of `Choice` that say how far each goes."""
LEVELS: dict[str, tuple[Any, ...]] = {
    "drop": (True,),
    "heads": (0.75, 0.5, 0.25),
    "ffn": (0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125),
    "rank": (0.75, 0.5, 0.375, 0.25, 0.125),
    "bits": (8, 4, 3, 2),
    "tokens": (8, 4, 3, 2),
}
"""How far each may go. Sensitivities are measured at every level of every layer."""


@dataclass(frozen=True)
class Choice:
    """What becomes of one layer, or of the table of tokens.

    Attributes:
        drop: it goes. heads, ffn: share of its key/value heads (each with its query heads) and of its inner channels that stay.
        rank: share of its matrices' numbers that two thin factors take (1: not factorized). bits: of a weight (16: as they are).
        tokens: bits of a number of the table of tokens, which has no other field (16: as they are; None: it is a layer).
    """

    drop: bool = False
    heads: float = 1.0
    ffn: float = 1.0
    rank: float = 1.0
    bits: int = 16
    tokens: int | None = None

    @property
    def changes(self) -> tuple[str, ...]:
        """Which of its fields change something."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default and getattr(self, f.name) != 16)

    @property
    def families(self) -> tuple[str, ...]:
        """Which ways of making it smaller it takes."""
        return tuple(family for family, names in FAMILIES.items() if not set(names).isdisjoint(self.changes))

    def only(self, name: str) -> Choice:
        """One of its changes alone."""
        return Choice(**{name: getattr(self, name)})

    def data(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        said = {"drop": "dropped", "heads": f"{self.heads:g} of the heads", "ffn": f"{self.ffn:g} of the channels"}
        said |= {"rank": f"factors of {self.rank:g}", "bits": f"{self.bits} bits", "tokens": f"{self.tokens} bits"}
        return ", ".join(said[name] for name in self.changes) or "as it is"


Plan = tuple[Choice, ...]
"""A choice for every layer, and behind them one for the table of tokens, where it can be changed."""
Train = Callable[[Model, str, Mapping[str, Any]], Model]


@dataclass(frozen=True)
class How:
    """How the edits of a plan are done, whatever they are given to do.

    Attributes:
        method, group: of quantization, see the edit `quantize`. by, objective: score of heads and channels, and the loss it follows, see the edit `prune-width`.
        samples, batch: calibration rows, and how many at a time.
    """

    method: Literal["rtn", "gptq"] = "gptq"
    group: int | None = 128
    by: str = "taylor"
    objective: str = "causal-lm"
    samples: int = 64
    batch: int = 16


def choices(levels: Mapping[str, Sequence[Any]]) -> list[Choice]:
    """Everything that may become of a layer: cut in width or factorized, and quantized or not; dropped; or left as it is. Then what may
    become of the table of tokens."""
    widths = [(h, f) for h in (1.0, *levels.get("heads", ())) for f in (1.0, *levels.get("ffn", ()))]
    shapes = [*(Choice(heads=h, ffn=f) for h, f in widths), *(Choice(rank=r) for r in levels.get("rank", ()))]
    kept = [dataclasses.replace(shape, bits=b) for shape in shapes for b in (16, *levels.get("bits", ()))]
    table = [Choice(tokens=b) for b in (16, *levels["tokens"])] if levels.get("tokens") else []
    return [*kept, *(Choice(drop=True) for _ in levels.get("drop", ())), *table]


def stages(plan: Sequence[Choice], how: How, between: Mapping[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """The edits of a plan as stages of a job: whole layers first, then widths, then factors, and rounding last.

    Args:
        between: further stages, before the rounding: what is rounded can no longer be trained.
    """
    made: dict[str, dict[str, Any]] = {}
    gone = [i for i, c in enumerate(plan) if c.drop]
    kept = [c for c in plan if not c.drop and c.tokens is None]
    table = next((c.tokens for c in plan if c.tokens is not None), 16)
    rows = {"samples": how.samples, "batch": how.batch}
    if gone:
        made["drop"] = {"edit": "drop-layers", "layers": gone}
    for part in ("heads", "ffn"):
        if any(getattr(c, part) != 1 for c in kept):
            made[part] = {"edit": "prune-width", "keep": [getattr(c, part) for c in kept], "parts": part, "by": how.by, **rows}
            if how.by in ("taylor", "gradient-norm") and how.objective != "causal-lm":
                made[part]["objective"] = how.objective
    if any(c.rank != 1 for c in kept):
        made["factorize"] = {"edit": "factorize", "ratio": [None if c.rank == 1 else 1 / c.rank for c in kept], "by": "inputs", **rows}
    made |= between or {}
    if table != 16:
        made["tokens"] = {"edit": "quantize-embedding", "bits": table, "group": how.group}
    if any(c.bits != 16 for c in kept):
        made["quantize"] = {"edit": "quantize", "bits": [c.bits for c in kept], "method": how.method, "group": how.group, **rows}
    return made


def previewed(spec: ModelSpec, made: Mapping[str, Mapping[str, Any]]) -> ModelSpec:
    """What the edits make of a model's description."""
    for stage in made.values():
        options = {k: v for k, v in stage.items() if k != "edit"}
        spec = lookup(PREVIEWS, stage["edit"], "preview")(spec, **options)
    return spec


def applied(
    model: Model, data: Any, made: Mapping[str, Mapping[str, Any]], seed: int, train: Train | None = None, kept: Kept | None = None
) -> Model:
    """What the edits make of a model; those that draw at random draw with the seed.

    Args:
        train: does a stage that trains, given its name and content; it leaves the model that it is given alone.
        kept: what earlier edits decomposed matrices into, for the next.
    """
    for name, stage in made.items():
        if "train" in stage:
            assert train is not None
            model = train(model, name, stage)
            continue
        edit = lookup(EDITS, stage["edit"], "edit")
        known = inspect.signature(edit).parameters
        options = {k: v for k, v in stage.items() if k != "edit"} | ({"seed": seed} if "seed" in known else {})
        options |= {name: value for name, value in (("data", data), ("kept", kept)) if name in known}
        model = edit(model, **options)
    return model


def check_plannable(spec: ModelSpec) -> None:
    """Refuse a model that nothing here measures, or whose layers are none that can be changed.

    Raises:
        BadInput: it is such a model, with the reason.
    """
    check_measurable(spec)
    if not spec.stack.depth:
        raise BadInput("this model has no layers")
    previewed(spec, stages([Choice(bits=8)] * spec.stack.depth, How()))
