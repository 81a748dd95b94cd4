"""Looking at models: plain functions (model, data) -> findings."""

from __future__ import annotations

from typing import Any

from layerwise.table import member

ANALYSES = {
    "inspect": "layerwise.analyze.overview:inspect",
    "angular-distance": "layerwise.analyze.similarity:angular_distance",
    "layer-drop": "layerwise.analyze.sensitivity:layer_drop",
    "block-drop": "layerwise.analyze.sensitivity:block_drop",
    "block-sweep": "layerwise.analyze.sensitivity:block_sweep",
    "gradient-norms": "layerwise.analyze.gradients:gradient_norms",
    "gradient-variance": "layerwise.analyze.gradients:gradient_variance",
    "stream-variance": "layerwise.analyze.stream:stream_variance",
    "layer-importance": "layerwise.analyze.scores:layer_importance",
    "layer-widths": "layerwise.analyze.widths:layer_widths",
    "group-importance": "layerwise.analyze.groups:group_importance",
    "quantization-error": "layerwise.analyze.quantization:quantization_error",
    "bits-curve": "layerwise.analyze.layer_bits:bits_curve",
    "weight-sizes": "layerwise.analyze.sparsity:weight_sizes",
    "cache-spectrum": "layerwise.analyze.spectrum:cache_spectrum",
    "cache-errors": "layerwise.analyze.thin_features:cache_errors",
    "attention-entropy": "layerwise.analyze.attention:attention_entropy",
    "operations": "layerwise.analyze.binary_cost:operations",
}

CHECKS = {
    "block-drop": "layerwise.edit.drop:preview_drop",
    "block-sweep": "layerwise.analyze.sensitivity:check_sweep",
    "stream-variance": "layerwise.analyze.stream:check_stream",
    "layer-importance": "layerwise.analyze.scores:check_importance",
    "layer-widths": "layerwise.analyze.widths:check_widths",
    "group-importance": "layerwise.analyze.groups:check_groups",
    "quantization-error": "layerwise.edit.quantization.quantize:preview_quantize",
    "bits-curve": "layerwise.analyze.layer_bits:check_curve",
    "weight-sizes": "layerwise.edit.prune.magnitude:preview_prune",
    "cache-spectrum": "layerwise.analyze.spectrum:check_spectrum",
    "cache-errors": "layerwise.analyze.thin_features:check_thin",
    "attention-entropy": "layerwise.analyze.attention:check_entropy",
}
"""What analyses need of a model's description and their options: (spec, **options), which raises BadInput; where an option names a model,
its description. The analysis asks it first, and the job check does so before the first stage trains."""


def __getattr__(name: str) -> Any:
    """`layerwise.analyze.some_name` is the function listed as `some-name`."""
    return member(ANALYSES, "analyze", name)
