"""Another head on the same stack."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch

from layerwise.models.model import Model, rebuilt
from layerwise.models.origin import origin_of, with_origin
from layerwise.models.spec import HeadSpec, ModelSpec


def classifier_head(
    model: Model,
    *,
    classes: int,
    pool: Literal["mean", "first", "last"] = "mean",
    pooler: Literal["dense", "binary"] | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
) -> Model:
    """The model with a fresh classifier in place of its head; embedding and stack are shared.

    Args:
        classes: number of classes. pool: how positions are reduced. pooler: what maps the result, see `HeadSpec.pooler`.
        dropout: before the classifier. seed: of its weights.
    """
    new = rebuilt(model, preview_classifier(model.spec, classes=classes, pool=pool, pooler=pooler, dropout=dropout))
    head: Any = new.head
    head.to_empty(device=model.device)
    std = getattr(model.spec.stack, "init_std", None)
    head.initialize(std, torch.Generator(device=model.device).manual_seed(seed or 0))
    if (origin := origin_of(new)) is not None:  # what the old head's classes were called, the new one's are not
        unnamed = {key: value for key, value in origin.config.items() if key not in ("id2label", "label2id")}
        with_origin(new, dataclasses.replace(origin, config=unnamed))
    return new


def preview_classifier(
    spec: ModelSpec,
    *,
    classes: int,
    pool: Literal["mean", "first", "last"] = "mean",
    pooler: Literal["dense", "binary"] | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> ModelSpec:
    """What `classifier_head` makes of a model's description."""
    return dataclasses.replace(spec, head=HeadSpec("classifier", classes=classes, pool=pool, pooler=pooler, dropout=dropout, bias=True))
