"""Model and data to metrics: plain functions (model, data) -> findings."""

from __future__ import annotations

from typing import Any

from layerwise.table import lookup

EVALUATIONS = {
    "language-modeling": "layerwise.evaluate.language:language_modeling",
    "masked-lm": "layerwise.evaluate.language:masked_language_modeling",
    "classification": "layerwise.evaluate.accuracy:classification",
}


def __getattr__(name: str) -> Any:
    """`layerwise.evaluate.some_name` is the function listed as `some-name`."""
    if name.startswith("_") or name.replace("_", "-") not in EVALUATIONS:
        raise AttributeError(f"module 'layerwise.evaluate' has no attribute '{name}'")
    return lookup(EVALUATIONS, name.replace("_", "-"), "evaluate")
