"""DINOv2 with registers: further tokens after the class token, without positions."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import PatchSpec
from layerwise.models.hf.dinov2 import dinov2_rules, read_dinov2, write_dinov2
from layerwise.models.hf.family import Family, patches_of
from layerwise.models.spec import ModelSpec


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    patch = {"patch_size": 16, **config}  # their default differs from DINOv2's
    return read_dinov2(patch, head, mask_token=True, registers=config.get("num_register_tokens", 4), antialias=True)


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {**write_dinov2(spec), "num_register_tokens": patches_of(spec).registers}


FAMILY = Family(
    "dinov2_with_registers",
    _read,
    _write,
    dinov2_rules("dinov2_with_registers."),
    base=("Dinov2WithRegistersModel",),
    classifier=("Dinov2WithRegistersForImageClassification",),
    prefix="dinov2_with_registers.",
    reads=PatchSpec,
)
