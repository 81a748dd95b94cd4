"""A model's description completed by the data it will read."""

from __future__ import annotations

import dataclasses

from layerwise.data.load import Data
from layerwise.embed.audio_spec import MelSpec, WaveSpec
from layerwise.embed.spec import GraphSpec, PatchSpec, PixelSpec, StemSpec, TokenSpec
from layerwise.errors import BadInput
from layerwise.models.plain_spec import PlainStackSpec
from layerwise.models.spec import ModelSpec


def filled(spec: ModelSpec, data: Data) -> ModelSpec:
    """A model's description with what the data decides: vocabulary, image size, number of classes."""
    if data.vocab is not None:
        spec = spec.with_vocab(data.vocab)
        if isinstance(spec.embedding, TokenSpec) and (spec.embedding.vocab or 0) < data.vocab:
            raise BadInput(f"model.embedding.vocab is {spec.embedding.vocab}, but the tokenizer has {data.vocab} tokens: leave vocab out")
    embedding, stack, head = spec.embedding, spec.stack, spec.head
    if isinstance(embedding, TokenSpec) and embedding.table == "glyphs" and not embedding.strings and data.tokenizer is not None:
        strings = tuple(data.tokenizer.id_to_token(i) or " " for i in range(embedding.vocab or 0))
        embedding = dataclasses.replace(embedding, strings=strings)
    if isinstance(embedding, PixelSpec | PatchSpec | StemSpec | GraphSpec):
        if data.kind != "images":
            raise BadInput(f"the model reads images but the data is {data.kind}")
        assert data.size is not None and data.channels is not None
        embedding = dataclasses.replace(embedding, channels=data.channels, size=data.size)
        if isinstance(stack, PlainStackSpec):
            inputs = data.channels * data.size[0] * data.size[1] if getattr(embedding, "flatten", False) else data.channels
            inputs = embedding.width if isinstance(embedding, StemSpec) else inputs
            stack = dataclasses.replace(stack, inputs=inputs)
    elif isinstance(embedding, MelSpec):
        raise BadInput("the model reads log-mel spectrograms; jobs have recordings as waveforms: take an embedding of kind wave")
    elif isinstance(embedding, WaveSpec):
        if data.kind != "sound":
            raise BadInput(f"the model reads sound but the data is {data.kind}")
        samples = min(split.arrays["waves"].shape[1] for split in (data.train, data.validation))
        if samples < embedding.least:
            raise BadInput(f"recordings of {samples} samples give no frame: the model's convolutions need {embedding.least}")
    elif data.kind != "text":
        raise BadInput(f"the model reads text but the data is {data.kind}")
    if head is not None and head.kind in ("classifier", "parameters") and head.classes is None:
        if data.classes is None:
            raise BadInput("a classifier needs data with labels, or model.head.classes")
        head = dataclasses.replace(head, classes=data.classes)
    return dataclasses.replace(spec, embedding=embedding, stack=stack, head=head)
