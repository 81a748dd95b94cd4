"""Model and data to metrics: plain functions (model, data) -> findings."""

from __future__ import annotations

from typing import Any

from layerwise.table import member

EVALUATIONS = {
    "token-routing": "layerwise.evaluate.skipping:token_routing",
    "chain-search": "layerwise.evaluate.chains:chain_search",
    "continuation": "layerwise.evaluate.continuation:continuation",
    "early-exits": "layerwise.evaluate.exits:early_exits",
    "self-speculation": "layerwise.evaluate.exits:self_speculation",
    "fusion-curve": "layerwise.evaluate.fusion:fusion_curve",
    "ensemble-accuracy": "layerwise.evaluate.ensemble:ensemble_accuracy",
    "composition": "layerwise.evaluate.experts:composition",
    "ghn-start": "layerwise.evaluate.ghn:ghn_start",
    "language-modeling": "layerwise.evaluate.language:language_modeling",
    "linear-probe": "layerwise.evaluate.probing:linear_probe",
    "masked-lm": "layerwise.evaluate.language:masked_language_modeling",
    "classification": "layerwise.evaluate.accuracy:classification",
    "embedding-agreement": "layerwise.evaluate.agreement:embedding_agreement",
    "recall": "layerwise.evaluate.recall:recall",
    "multiple-choice": "layerwise.evaluate.choice:multiple_choice",
}

CHECKS = {
    "token-routing": "layerwise.evaluate.skipping:check_routing",
    "chain-search": "layerwise.evaluate.chains:check_chains",
    "continuation": "layerwise.evaluate.continuation:check_continuation",
    "early-exits": "layerwise.evaluate.exits:check_exits",
    "self-speculation": "layerwise.evaluate.exits:check_speculation",
    "fusion-curve": "layerwise.evaluate.fusion:check_fusion",
    "ghn-start": "layerwise.evaluate.ghn:check_start",
    "language-modeling": "layerwise.evaluate.language:check_path",
    "linear-probe": "layerwise.evaluate.probing:check_probe",
    "embedding-agreement": "layerwise.evaluate.agreement:check_agreement",
    "masked-lm": "layerwise.objectives.language:check_rate",
    "multiple-choice": "layerwise.evaluate.choice:check_questions",
}
"""What evaluations need of a model's description and their options, as `layerwise.analyze.CHECKS`."""


def __getattr__(name: str) -> Any:
    """`layerwise.evaluate.some_name` is the function listed as `some-name`."""
    return member(EVALUATIONS, "evaluate", name)
