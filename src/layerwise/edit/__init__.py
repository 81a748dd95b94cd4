"""Model to model, once: plain functions with typed keyword arguments, with calibration data or without.

An edit returns a new `Model` that shares what it did not change; the one it was given stays as it was.
"""

from __future__ import annotations

from typing import Any

from layerwise.table import member

EDITS = {
    "route-tokens": "layerwise.edit.token_routes:route_tokens",
    "expand": "layerwise.edit.expansion:expand",
    "interpolate": "layerwise.edit.merging.interpolate:interpolate",
    "ot-fuse": "layerwise.edit.merging.transport:ot_fuse",
    "binarize": "layerwise.edit.binary:binarize",
    "cast": "layerwise.edit.dtype:cast",
    "classifier-head": "layerwise.edit.head:classifier_head",
    "prune-magnitude": "layerwise.edit.prune.magnitude:prune_magnitude",
    "prune-width": "layerwise.edit.prune.structured:prune_width",
    "rewind": "layerwise.edit.prune.magnitude:rewind",
    "drop-layers": "layerwise.edit.drop:drop_layers",
    "factorize": "layerwise.edit.lowrank:factorize",
    "add-filters": "layerwise.edit.filtering:add_filters",
    "drop-filters": "layerwise.edit.filtering:drop_filters",
    "evict-cache": "layerwise.edit.caches:evict_cache",
    "ghn-initialize": "layerwise.edit.ghn:ghn_initialize",
    "grow": "layerwise.edit.growth:grow",
    "initialize": "layerwise.edit.reset:initialize",
    "inject-outliers": "layerwise.edit.quantization.outliers:inject_outliers",
    "lora": "layerwise.edit.adapt:lora",
    "load-lora": "layerwise.edit.adapt:load_lora",
    "merge": "layerwise.edit.linears:merge",
    "merge-lora": "layerwise.edit.adapt:merge_lora",
    "pack-binary": "layerwise.edit.binary:pack_binary",
    "quantize": "layerwise.edit.quantization.quantize:quantize",
    "quantize-cache": "layerwise.edit.caches:quantize_cache",
    "quantize-embedding": "layerwise.edit.quantization.tables:quantize_embedding",
    "quantize-nf4": "layerwise.edit.linears:quantize_nf4",
    "calibrate-routes": "layerwise.edit.routes:calibrate_routes",
    "rotate": "layerwise.edit.quantization.rotation:rotate",
    "route-layers": "layerwise.edit.routes:route_layers",
    "settle-routes": "layerwise.edit.routes:settle_routes",
    "shrink-cache": "layerwise.edit.caches:shrink_cache",
    "subclone": "layerwise.edit.cloning:subclone",
    "wave-front": "layerwise.edit.sound:wave_front",
    "widen-cache": "layerwise.edit.caches:widen_cache",
}

PREVIEWS = {
    "route-tokens": "layerwise.edit.token_routes:preview_tokens",
    "expand": "layerwise.edit.expansion:preview_expand",
    "interpolate": "layerwise.edit.merging.interpolate:preview_interpolate",
    "ot-fuse": "layerwise.edit.merging.transport:preview_fuse",
    "binarize": "layerwise.edit.binary:preview_binarize",
    "cast": "layerwise.edit.dtype:preview_cast",
    "classifier-head": "layerwise.edit.head:preview_classifier",
    "prune-magnitude": "layerwise.edit.prune.magnitude:preview_prune",
    "prune-width": "layerwise.edit.prune.structured:preview_width",
    "rewind": "layerwise.edit.prune.magnitude:preview_rewind",
    "drop-layers": "layerwise.edit.drop:preview_drop",
    "factorize": "layerwise.edit.lowrank:preview_factorize",
    "add-filters": "layerwise.edit.filtering:preview_add_filters",
    "drop-filters": "layerwise.edit.filtering:preview_drop_filters",
    "evict-cache": "layerwise.edit.caches:preview_evict",
    "ghn-initialize": "layerwise.edit.ghn:preview_ghn",
    "grow": "layerwise.edit.growth:preview_grow",
    "initialize": "layerwise.edit.reset:preview_initialize",
    "inject-outliers": "layerwise.edit.quantization.outliers:preview_outliers",
    "lora": "layerwise.edit.adapt:preview_lora",
    "load-lora": "layerwise.edit.adapt:preview_load",
    "merge": "layerwise.edit.linears:preview_merge",
    "merge-lora": "layerwise.edit.linears:preview_merge",
    "pack-binary": "layerwise.edit.binary:preview_pack",
    "quantize": "layerwise.edit.quantization.quantize:preview_quantize",
    "quantize-cache": "layerwise.edit.caches:preview_quantize_cache",
    "quantize-embedding": "layerwise.edit.quantization.tables:preview_quantize_embedding",
    "quantize-nf4": "layerwise.edit.linears:preview_nf4",
    "calibrate-routes": "layerwise.edit.routes:preview_calibrate",
    "rotate": "layerwise.edit.quantization.rotation:preview_rotate",
    "route-layers": "layerwise.edit.routes:preview_route",
    "settle-routes": "layerwise.edit.routes:preview_settle",
    "shrink-cache": "layerwise.edit.caches:preview_shrink",
    "subclone": "layerwise.edit.cloning:preview_subclone",
    "wave-front": "layerwise.edit.sound:preview_wave_front",
    "widen-cache": "layerwise.edit.caches:preview_widen_cache",
}
"""What an edit makes of a model's description, without a model: (spec, **options) -> spec, or BadInput. Every edit has one,
so that a job that cannot work is refused before its first stage trains."""


def __getattr__(name: str) -> Any:
    """`layerwise.edit.some_name` is the function listed as `some-name`."""
    return member(EDITS, "edit", name)
