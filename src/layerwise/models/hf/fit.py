"""What stands in the way of a description being held by a Hugging Face family.

A family can hold a description if what it would write reads back as the same: there is no second list of conditions that
could disagree with what is written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from layerwise.errors import BadInput
from layerwise.models.hf.family import Family, parts_of
from layerwise.models.plain_spec import PlainLayerSpec, PlainStackSpec
from layerwise.models.room import closed
from layerwise.models.spec import HeadSpec, ModelSpec, TwoTowersSpec
from layerwise.stack.spec import LayerSpec, StackSpec

TRAINING = {"dropout", "attention_dropout", "feature_dropout", "drop", "norm_gain", "feature_gradient", "linears", "std", "kind", "added"}
"""Fields that change how a model is trained but not what it computes."""


FAR = 10_000
"""As many differences count what is not comparable at all."""


def unreadable(spec: ModelSpec | TwoTowersSpec) -> str | None:
    """Why no family at all could hold a description: a stack is empty, or its weights are not stored as they are."""
    if any(part.filters is not None for part in parts_of(spec)):
        return "it has filters: drop them first (edit: drop-filters)"
    if any(getattr(part.embedding, "table", "learned") == "packed" for part in parts_of(spec)):
        return "its table of tokens is packed: merge it first (edit: merge)"
    for where, stack in (pair for part in parts_of(spec) for pair in (("stack", part.stack), ("decoder", part.decoder))):
        if stack is not None and not stack.depth:
            return f"its {where} has no layer"
        if not isinstance(stack, StackSpec):
            continue
        for i, layer in enumerate(stack.layers):
            if layer.router is not None and layer.router.decides == "ffn":
                return f"layer {i} has a router, which decides token by token what runs: no family has those; export with format layerwise"
            if layer.router is not None:
                return (
                    f"layer {i} has a router, and no family runs a layer for some prompts and not for others: settle-routes takes them off where "
                    "all prompts run the same layers; else export with format layerwise"
                )
            kinds = [linear.kind for linear in layer.linears.values() if linear.kind != "dense"]
            if kinds:
                return f"layer {i} has {kinds[0]} linears: merge them first (edit: merge)"
    return None


def differences(family: Family, spec: ModelSpec | TwoTowersSpec) -> list[str]:
    """In which ways a family would change what a description computes, the most telling first; none: it can hold it.

    Of two families the one with fewer differences is nearer.
    """
    if isinstance(spec, TwoTowersSpec) or family.reads is TwoTowersSpec:
        return _tower_differences(family, spec)
    if not isinstance(spec.embedding, family.reads) or not isinstance(spec.stack, family.stack):
        return [f"its embedding is of kind {spec.embedding.kind}; {family.name} has {family.reads.kind}"] * (2 * FAR)  # type: ignore[attr-defined]
    spec = closed(spec)
    if (spec.decoder is not None) != family.seq2seq:
        return [f"{family.name} has {_shape(family.seq2seq)}; this model has {_shape(not family.seq2seq)}"] * FAR
    head = spec.head is not None
    try:
        back = family.read(_plain(family.write(spec)), head)
    except BadInput as error:
        return [f"{family.name} cannot have this: {error}"] * FAR
    return _model_differences(family.name, spec, back) or _nameless(family, spec)


def _tower_differences(family: Family, spec: Any) -> list[str]:
    """The same for two towers."""
    if not isinstance(spec, TwoTowersSpec) or family.reads is not TwoTowersSpec:
        return [f"{family.name} has {'two towers' if family.reads is TwoTowersSpec else 'one stack'}; this model has not"] * (2 * FAR)
    try:
        given: Any = spec  # the same functions, of another kind of description
        back: Any = family.read(family.write(given), False)
    except BadInput as error:
        return [f"{family.name} cannot have this: {error}"] * FAR
    found = [d for a, b in zip(spec.towers, back.towers, strict=True) for d in _model_differences(family.name, a, b)]
    return found or _nameless(family, spec)


def _nameless(family: Family, spec: Any) -> list[str]:
    """A tensor that the family has no name for."""
    try:
        family.pairs(spec)
    except BadInput as error:
        return [str(error)]
    return []


def _model_differences(family: str, spec: ModelSpec, back: ModelSpec) -> list[str]:
    found = list(_stack_differences(family, "", spec.stack, back.stack))
    if spec.decoder is not None and back.decoder is not None:
        found += _stack_differences(family, "decoder ", spec.decoder, back.decoder)
    found += _named(family, "its embedding", _embedding(spec.embedding), _embedding(back.embedding))
    if (spec.target is None) != (back.target is None):
        found.append(f"its decoder {'shares the' if spec.target is None else 'has an'} embedding; {family} decoders do the opposite")
    elif spec.target is not None and back.target is not None:
        found += _named(family, "its decoder's embedding", _embedding(spec.target), _embedding(back.target))
    if spec.head is not None and back.head is not None:
        found += _named(family, "its head", _head(spec.head), _head(back.head))
    elif spec.head is not None:
        found.append(f"it has a head of kind {spec.head.kind}; {family} has none")
    return found


def _shape(seq2seq: bool) -> str:
    return "an encoder and a decoder" if seq2seq else "one stack"


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "max_position_embeddings": config.get("max_position_embeddings", 2048)}


def _stack_differences(family: str, where: str, ours: Any, theirs: Any) -> Iterator[str]:
    """Each field of each layer that differs, then what is around the layers."""
    first = _layer(ours.layers[0])
    for i, (a, b) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        here, there = _layer(a), _layer(b)
        for field in here:
            if _equal(here[field], there.get(field)):
                continue
            if i and _equal(there.get(field), first.get(field)):
                yield f"{where}layer {i} has {field} {here[field]!r} and layer 0 has {first[field]!r}; a {family} cannot have both"
            else:
                yield f"{where}layer {i} has {field} {here[field]!r}; {family} layers have {there.get(field)!r}"
    if (shares := getattr(theirs, "shared", ())) and getattr(ours, "shared", ()) != shares:
        yield f"its {where}layers do not share their weights as those of {family} do ({shares})"
    yield from _named(family, f"its {where or 'stack'}".strip(), _around(ours), _around(theirs))


def _named(family: str, what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    differ = [field for field in ours if not _equal(ours[field], theirs.get(field))]
    return [f"{what} has {field} {ours[field]!r}; {family} has {theirs.get(field)!r}" for field in differ]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)
    return a == b


def _fields(spec: Any) -> dict[str, Any]:
    return {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name not in TRAINING}


def _layer(spec: LayerSpec | PlainLayerSpec) -> dict[str, Any]:
    """What a layer computes: fields without effect are left out, defaults written out."""
    found = _fields(spec)
    if isinstance(spec, PlainLayerSpec):
        found |= {"kind": spec.kind, "middle": spec.narrow, "project": spec.projected}
        return {k: v for k, v in found.items() if spec.norm == "group" or k not in ("group", "groups")}
    # A layer-norm-scaled layer computes what a pre-norm layer does: only its initial gains differ.
    found["placement"] = "pre" if spec.placement == "lns" else spec.placement
    found["attention_scale"] = (spec.head_dim or 1) ** -0.5 if spec.attention_scale is None else spec.attention_scale
    found["rotary_dim"] = spec.rotary_dim or spec.head_dim
    found["key_bias"] = spec.qkv_bias if spec.key_bias is None else spec.key_bias
    found["layer_scale"] = spec.layer_scale is not None  # the number is only where its training starts
    if spec.position != "rotary":
        found = {k: v for k, v in found.items() if k not in ("rope_theta", "rope_scaling", "rotary_dim")}
    if spec.norm != "layernorm":
        found.pop("norm_bias")
    return found


def _around(spec: StackSpec | PlainStackSpec) -> dict[str, Any]:
    if isinstance(spec, PlainStackSpec):
        return {"inputs": spec.inputs, "depth": spec.depth, "final_norm": spec.final_norm}
    found: dict[str, Any] = {"width": spec.width, "depth": spec.depth, "final_norm": spec.final_norm}
    if any(layer.position == "relative" for layer in spec.layers):
        found |= {"buckets": spec.buckets, "max_distance": spec.max_distance}
    return found


def _embedding(spec: Any) -> dict[str, Any]:
    without = {"max_length", "offset", "antialias"} if getattr(spec, "position", None) != "learned" else set()
    norm = getattr(spec, "norm", None)
    without |= {"norm_eps"} if norm is None and not getattr(spec, "project_norm", False) else set()
    without |= {"groups"} if norm != "group" else set()
    return {"kind": spec.kind, **{k: v for k, v in _fields(spec).items() if k not in without}}


def _head(spec: HeadSpec) -> dict[str, Any]:
    found = {"kind": spec.kind, **_fields(spec)}
    if spec.kind == "lm":
        found = {k: v for k, v in found.items() if k not in ("classes", "pool", "pool_norm", "end_token")}
        if spec.transform is None:
            found = {k: v for k, v in found.items() if k not in ("norm", "norm_eps")}
    else:
        found = {k: found[k] for k in ("kind", "classes", "size", "pool", "end_token", "pool_norm", "bias")} | (
            {"norm_eps": spec.norm_eps} if spec.pool_norm else {}
        )
    return found
