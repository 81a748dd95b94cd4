"""The front end of a sound model without what only its pre-training or its size needed."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from layerwise.embed.audio_spec import WaveSpec
from layerwise.errors import BadInput
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec


def wave_front(model: Model, *, project_norm: bool = False, mask_vector: bool = False, feature_gradient: float = 0.1) -> Model:
    """A copy of a sound model whose front end lacks parts; every tensor that stays is a copy, so the two can be trained side by side.

    With `drop-layers` before it, this is the start of DistilHuBERT's student: the teacher's convolutions, projection, positions and lowest
    layers, without the LayerNorm before the projection (the published student has none, though the projection was trained behind one).

    Args:
        project_norm: keep that norm. mask_vector: keep the vector that stands for hidden frames.
        feature_gradient: see `WaveSpec`; 0.1 as published.

    Source: Chang, Yang and Lee 2022, "DistilHuBERT" (arXiv 2110.01900), section 2.3, and its published code.
    """
    spec = preview_wave_front(model.spec, project_norm=project_norm, mask_vector=mask_vector, feature_gradient=feature_gradient)
    return copy.deepcopy(rebuilt(model, spec))


def preview_wave_front(
    spec: ModelSpec, *, project_norm: bool = False, mask_vector: bool = False, feature_gradient: float = 0.1, **_: Any
) -> ModelSpec:
    """What `wave_front` makes of a model's description."""
    old = spec.embedding
    if not isinstance(old, WaveSpec):
        raise BadInput("wave-front is about models that read waveforms (embedding.kind: wave); this one does not")
    new = dataclasses.replace(
        old,
        project_norm=project_norm and old.project_norm,
        mask_vector=mask_vector and old.mask_vector,
        feature_gradient=feature_gradient,
    )
    return dataclasses.replace(spec, embedding=new)
