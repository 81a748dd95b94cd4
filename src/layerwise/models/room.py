"""Whether a model fits this machine at all, worked out from its description before any memory is taken."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch

from layerwise.embed.spec import PatchSpec, PixelSpec, StemSpec, TokenSpec
from layerwise.errors import BadInput
from layerwise.memory import check_room
from layerwise.models.filters import Filters
from layerwise.models.model import make_model
from layerwise.models.plain_spec import PlainStackSpec
from layerwise.models.spec import ModelSpec, TwoTowersSpec
from layerwise.stack.layer import Layer
from layerwise.stack.spec import StackSpec


def closed(spec: ModelSpec) -> ModelSpec:
    """The description with some number for what the data is yet to decide: vocabulary, images, classes."""
    embedding, stack, head = spec.embedding, spec.stack, spec.head
    if isinstance(embedding, TokenSpec):
        spec = spec.with_vocab(2)
        embedding = spec.embedding
    if isinstance(embedding, PatchSpec):
        size = embedding.size or (14 * embedding.patch[0], 14 * embedding.patch[1])
        embedding = dataclasses.replace(embedding, channels=embedding.channels or 3, size=size)
    if isinstance(embedding, StemSpec) and isinstance(stack, PlainStackSpec):
        embedding = dataclasses.replace(embedding, channels=embedding.channels or 3, size=None)  # convolutions read any size
        stack = dataclasses.replace(stack, inputs=embedding.width)
    if isinstance(embedding, PixelSpec) and isinstance(stack, PlainStackSpec):
        channels, (h, w) = embedding.channels or 3, embedding.size or (32, 32)
        embedding = dataclasses.replace(embedding, channels=channels, size=(h, w))
        stack = dataclasses.replace(stack, inputs=channels * h * w if embedding.flatten else channels)
    if head is not None and head.kind in ("classifier", "parameters") and head.classes is None:
        head = dataclasses.replace(head, classes=2)
    return dataclasses.replace(spec, embedding=embedding, stack=stack, head=head)


def parameters_of(spec: ModelSpec | TwoTowersSpec) -> int:
    """How many parameters a description asks for. Layers that are alike are laid out once, so that depth costs nothing.

    Raises:
        BadInput: its sizes are beyond what a tensor can have.
    """
    if isinstance(spec, TwoTowersSpec):
        return sum(map(parameters_of, spec.towers))
    spec, further = closed(spec), Counter[Any]()
    kinds: dict[str, Any] = {}
    shallow: dict[str, Any] = {}
    for part in ("stack", "decoder"):
        stack = getattr(spec, part)
        if not isinstance(stack, StackSpec) or stack.depth < 2:
            continue
        first, *others = stack.layers
        own = {i for i, shared in enumerate(stack.shared) if i == shared} or range(stack.depth)
        for layer in (layer for i, layer in enumerate(others, 1) if i in own):
            kinds[repr(layer)] = layer
            further[repr(layer)] += 1
        shallow[part] = stack.with_layers([first])
    try:
        with torch.device("meta"):
            count = _size(make_model(dataclasses.replace(spec, filters=None, **shallow)))
            count += _size(Filters(spec.filters, spec.stack.width)) if spec.filters is not None else 0
            return count + sum(times * _size(Layer(kinds[kind])) for kind, times in further.items())
    except (AssertionError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadInput(f"no model of these sizes can be built: {str(error).splitlines()[0]}") from error


def _size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in (*module.parameters(), *module.buffers()))


def check_model(spec: ModelSpec | TwoTowersSpec, bytes_each: int = 4) -> None:
    """`check_room` of a model's parameters.

    Raises:
        BadInput: they do not fit.
    """
    count = parameters_of(spec)
    check_room(count * bytes_each, f"a model of {count:,} parameters")
