"""CLIP: a text and an image tower whose projections are compared by a scaled cosine."""

from __future__ import annotations

from typing import Any

from layerwise.models.hf.clip_text_model import read_text, text_rules, write_text
from layerwise.models.hf.clip_vision_model import read_vision, vision_rules, write_vision
from layerwise.models.hf.family import Family, Rule
from layerwise.models.spec import TwoTowersSpec


def _tower(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A tower's part of the config; in old ones a second part overrides the first."""
    return {**(config.get(name) or {}), **(config.get(f"{name}_dict") or {})}


def _read(config: dict[str, Any], head: bool) -> Any:
    size = config.get("projection_dim", 512)
    return TwoTowersSpec(read_text(_tower(config, "text_config"), size), read_vision(_tower(config, "vision_config"), size))


def _write(spec: Any) -> dict[str, Any]:
    text, image = write_text(spec.text), write_vision(spec.image)
    return {
        "projection_dim": text["projection_dim"],
        "text_config": {"model_type": "clip_text_model", **text},
        "vision_config": {"model_type": "clip_vision_model", **image},
    }


FAMILY = Family(
    "clip",
    _read,
    _write,
    (*text_rules("text."), *vision_rules("image."), Rule(("logit_scale",), "logit_scale")),
    base=("CLIPModel",),
    reads=TwoTowersSpec,
    ignored=("embeddings.position_ids",),
)
