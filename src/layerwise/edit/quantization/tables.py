"""Quantizing the table of token vectors, packed."""

from __future__ import annotations

import dataclasses
from typing import Any

from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec


def quantize_embedding(model: Model, *, bits: int = 8, group: int | None = None) -> Model:
    """The model with its token vectors rounded to the nearest of 2, 3, 4 or 8 bits, packed and frozen; positions and types stay.

    Args:
        group: neighbours in a vector that share a scale (None: all).

    Raises:
        BadInput: see `preview_quantize_embedding`.
    """
    new = rebuilt(model, preview_quantize_embedding(model.spec, bits=bits, group=group))
    table: Any = new.embedding.tokens
    table.to_empty(device=model.device)
    table.store(model.token_matrix.detach())
    return new


def preview_quantize_embedding(spec: ModelSpec, *, bits: int = 8, group: int | None = None, **_: Any) -> ModelSpec:
    """What `quantize_embedding` makes of a model's description.

    Raises:
        BadInput: bits that there are not, a model without a learned table, or one whose head scores the vocabulary.
    """
    embedding = spec.embedding
    if not isinstance(embedding, TokenSpec) or embedding.table != "learned" or spec.decoder is not None:
        raise BadInput("quantize-embedding packs the learned token vectors of a model with one stack; this model has none")
    if spec.head is not None and spec.head.kind == "lm":
        raise BadInput("a head that scores the vocabulary reads the whole table of tokens for every token, so the table stays as it is")
    return dataclasses.replace(spec, embedding=dataclasses.replace(embedding, table="packed", bits=bits, group=group))
