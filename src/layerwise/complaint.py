"""Checking plain data against a description of it, and saying what is wrong so that a person can put it right."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from layerwise.errors import BadInput
from layerwise.table import lookup, nearest

FORBID = {"extra": "forbid"}
"""Pydantic's settings of every description: a key that is not known is refused."""

TITLES = {
    "Job": "layerwise.jobs.schema:Job",
    "Generate": "layerwise.jobs.schema:Generate",
    "Export": "layerwise.jobs.schema:Export",
    "ModelSpec": "layerwise.models.spec:ModelSpec",
    "DataSpec": "layerwise.data.spec:DataSpec",
    "TrainSpec": "layerwise.train.spec:TrainSpec",
}
"""Where the descriptions that are checked as a whole stand."""

SECTIONS = {
    "claim": "layerwise.jobs.schema:Claim",
    "paper": "layerwise.jobs.schema:Paper",
    "relations": "layerwise.jobs.schema:Relation",
    "reach": "layerwise.jobs.reach:Reach",
    "stack": "layerwise.stack.spec:StackSpec",
    "decoder": "layerwise.stack.spec:StackSpec",
    "layer": "layerwise.stack.spec:LayerSpec",
    "linears": "layerwise.stack.parts_spec:LinearSpec",
    "cache": "layerwise.stack.parts_spec:CacheSpec",
    "plain": "layerwise.models.plain_spec:PlainLayerSpec",
    "embedding": "layerwise.embed.spec:TokenSpec",
    "target": "layerwise.embed.spec:TokenSpec",
    "pixels": "layerwise.embed.spec:PixelSpec",
    "graph": "layerwise.embed.spec:GraphSpec",
    "patches": "layerwise.embed.spec:PatchSpec",
    "stem": "layerwise.embed.spec:StemSpec",
    "wave": "layerwise.embed.audio_spec:WaveSpec",
    "mel": "layerwise.embed.audio_spec:MelSpec",
    "head": "layerwise.models.spec:HeadSpec",
    "optimizer": "layerwise.optim.spec:OptimizerSpec",
    "schedule": "layerwise.optim.spec:ScheduleSpec",
    "tokenizer": "layerwise.data.spec:TokenizerSpec",
    "augment": "layerwise.data.spec:AugmentSpec",
}
"""What describes a section, by its key (or the tag that tells kinds of it apart)."""


def parsed(adapter: TypeAdapter[Any], value: Any, where: str) -> Any:
    """`value` validated, with pydantic's complaint turned into one message for a person."""
    try:
        made = adapter.validate_python(value)
        refuse_truth(value, made, where)
        return made
    except ValidationError as error:
        raise BadInput(_complaint(error, where)) from error
    except RecursionError:
        raise BadInput(f"{where or 'the job'} is nested too deeply") from None


def refuse_truth(given: Any, made: Any, where: str) -> None:
    """Refuse `yes` where a number belongs, which pydantic would read as 1."""
    if isinstance(given, bool) and isinstance(made, int | float) and not isinstance(made, bool):
        raise BadInput(f"{where}: a number is expected (got {str(given)!r})")
    if isinstance(given, dict):
        for key, inner in given.items():
            reached = made.get(key) if isinstance(made, dict) else getattr(made, str(key), None)
            refuse_truth(inner, reached, f"{where}.{key}" if where else str(key))
    elif isinstance(given, list) and isinstance(made, list | tuple):
        for i, (inner, reached) in enumerate(zip(given, made, strict=False)):
            refuse_truth(inner, reached, f"{where}.{i}")


def _complaint(error: ValidationError, where: str) -> str:
    # Of several complaints the first unknown key is the likeliest cause of the others (a missing one, a wrong shape).
    errors = error.errors()
    first = next((e for e in errors if e["type"] in ("extra_forbidden", "unexpected_keyword_argument")), errors[0])
    whole = [str(part) for part in first["loc"] if part != "[key]"]
    # A tag that tells kinds of embeddings and stacks apart follows the key of the thing itself.
    tagged = {i for i, part in enumerate(whole) if part in TAGS.get(whole[i - 1] if i else "", ())}
    loc = [part for i, part in enumerate(whole) if i not in tagged]
    place = ".".join([where, *loc] if where else loc) or "the job"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _siblings(error.title, whole)
        more = f" Known: {', '.join(known)}." if known else ""
        return f"{place}: unknown key.{nearest(loc[-1], known)}{more}"
    if first["type"] == "missing":
        return f"{place}: this key is required"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("dict_type", "model_type", "dataclass_type", "model_attributes_type", "mapping_type"):
        message = "a mapping is expected"
    given = first.get("input")
    shown = "" if isinstance(given, dict) or first["type"] == "value_error" else f" (got {str(given)[:80]!r})"
    return f"{place}: {message}{shown}"


TAGS = {"embedding": ("tokens", "pixels"), "stack": ("layers", "plain")}


def _siblings(title: str, loc: list[str]) -> list[str]:
    """Names of the fields beside an unknown key."""
    place = TITLES.get(title)
    for part in loc[:-1]:
        place = SECTIONS.get(part, place)
    if place is None:
        return []
    spec = lookup({title: place}, title, "section")
    return list(spec.model_fields) if isinstance(spec, type) and issubclass(spec, BaseModel) else [f.name for f in dataclasses.fields(spec)]
