"""Model to model, once: plain functions with typed keyword arguments, with calibration data or without.

An edit returns a new `Model` that shares what it did not change; the one it was given stays as it was.
"""

from __future__ import annotations

from typing import Any

from layerwise.table import member

EDITS = {
    "drop-layers": "layerwise.edit.drop:drop_layers",
    "grow": "layerwise.edit.growth:grow",
    "initialize": "layerwise.edit.reset:initialize",
    "lora": "layerwise.edit.adapt:lora",
    "load-lora": "layerwise.edit.adapt:load_lora",
    "merge-lora": "layerwise.edit.adapt:merge_lora",
}

PREVIEWS = {
    "drop-layers": "layerwise.edit.drop:preview_drop",
    "grow": "layerwise.edit.growth:preview_grow",
    "initialize": "layerwise.edit.reset:preview_initialize",
    "lora": "layerwise.edit.adapt:preview_lora",
    "load-lora": "layerwise.edit.adapt:preview_load",
    "merge-lora": "layerwise.edit.adapt:preview_merge",
}
"""What an edit makes of a model's description, without a model: (spec, **options) -> spec, or BadInput. Every edit has one,
so that a job that cannot work is refused before its first stage trains."""


def __getattr__(name: str) -> Any:
    """`layerwise.edit.some_name` is the function listed as `some-name`."""
    return member(EDITS, "edit", name)
