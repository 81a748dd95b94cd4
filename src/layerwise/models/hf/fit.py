"""What stands in the way of a description being held by a Hugging Face family.

A family can hold a description if what it would write reads back as the same: there is no second list of conditions that
could disagree with what is written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.models.hf.family import Family, stack_of, tokens_of
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

TRAINING = {"dropout", "attention_dropout", "drop", "norm_gain", "linears", "std", "kind"}
"""Fields that change how a model is trained but not what it computes."""


FAR = 10_000
"""As many differences count what is not comparable at all."""


def unreadable(spec: ModelSpec) -> str | None:
    """Why no family at all could hold a description: it is not of plain transformer layers over tokens."""
    if not isinstance(spec.embedding, TokenSpec) or not isinstance(spec.stack, StackSpec):
        return "it reads images, and these families read tokens"
    for where, stack in (("stack", spec.stack), ("decoder", spec.decoder)):
        if stack is None:
            continue
        if not stack.depth:
            return f"its {where} has no layer"
        for i, layer in enumerate(stack.layers):
            kinds = [linear.kind for linear in layer.linears.values() if linear.kind != "dense"]
            if kinds:
                return f"layer {i} has {kinds[0]} linears: merge them first (edit: merge-lora)"
    return None


def differences(family: Family, spec: ModelSpec) -> list[str]:
    """In which ways a family would change what a description computes, the most telling first; none: it can hold it.

    Of two families the one with fewer differences is nearer.
    """
    if (spec.decoder is not None) != family.seq2seq:
        return [f"{family.name} has {_shape(family.seq2seq)}; this model has {_shape(not family.seq2seq)}"] * FAR
    head = spec.head is not None
    try:
        back = family.read(_plain(family.write(spec)), head)
    except BadInput as error:
        return [f"{family.name} cannot have this: {error}"] * FAR
    found = list(_stack_differences(family.name, "", stack_of(spec), stack_of(back)))
    if spec.decoder is not None and back.decoder is not None:
        found += _stack_differences(family.name, "decoder ", spec.decoder, back.decoder)
    found += _named(family.name, "its embedding", _embedding(tokens_of(spec)), _embedding(tokens_of(back)))
    if (spec.target is None) != (back.target is None):
        found.append(f"its decoder {'shares the' if spec.target is None else 'has an'} embedding; {family.name} decoders do the opposite")
    elif spec.target is not None and back.target is not None:
        found += _named(family.name, "its decoder's embedding", _embedding(spec.target), _embedding(back.target))
    if spec.head is not None and back.head is not None:
        found += _named(family.name, "its head", _head(spec.head), _head(back.head))
    if found:
        return found
    try:
        family.pairs(spec)
    except BadInput as error:
        return [str(error)]
    return []


def _shape(seq2seq: bool) -> str:
    return "an encoder and a decoder" if seq2seq else "one stack"


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "max_position_embeddings": config.get("max_position_embeddings", 2048)}


def _stack_differences(family: str, where: str, ours: StackSpec, theirs: StackSpec) -> Iterator[str]:
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


def _layer(spec: LayerSpec) -> dict[str, Any]:
    """What a layer computes: fields without effect are left out, defaults written out."""
    found = _fields(spec)
    # A layer-norm-scaled layer computes what a pre-norm layer does: only its initial gains differ.
    found["placement"] = "pre" if spec.placement == "lns" else spec.placement
    found["attention_scale"] = (spec.head_dim or 1) ** -0.5 if spec.attention_scale is None else spec.attention_scale
    found["rotary_dim"] = spec.rotary_dim or spec.head_dim
    if spec.position != "rotary":
        found = {k: v for k, v in found.items() if k not in ("rope_theta", "rope_scaling", "rotary_dim")}
    if spec.norm != "layernorm":
        found.pop("norm_bias")
    return found


def _around(spec: StackSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"width": spec.width, "depth": spec.depth, "final_norm": spec.final_norm}
    if any(layer.position == "relative" for layer in spec.layers):
        found |= {"buckets": spec.buckets, "max_distance": spec.max_distance}
    return found


def _embedding(spec: TokenSpec) -> dict[str, Any]:
    without = {"max_length", "offset"} if spec.position != "learned" else set()
    return {k: v for k, v in _fields(spec).items() if k not in without | ({"norm_eps"} if spec.norm is None else set())}


def _head(spec: HeadSpec) -> dict[str, Any]:
    found = {"kind": spec.kind, **_fields(spec)}
    if spec.kind == "lm":
        found = {k: v for k, v in found.items() if k not in ("classes", "pool")}
        if spec.transform is None:
            found = {k: v for k, v in found.items() if k not in ("norm", "norm_eps")}
    return found
