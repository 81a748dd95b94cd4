"""Which numbers a stage can leave, known before it runs, so that a claim on another one is refused in time.

A row says everything its function or class may measure; some of it depends on options and data. What has no row can be
anything, and a claim on it is looked at when the run has ended. `tests/jobs/test_jobs_metrics.py` compares the rows with what
is measured.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

TRAINING = ("train_loss",)
EXPORT = ("export_bytes",)
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "answers": (),
    "cache-reconstruction": ("key_error", "value_error", "cache_loss"),
    "causal-lm": (),
    "classification": (),
    "deep-supervision": (),
    "distilled-masked-lm": (),
    "distillation": (),
    "early-exit-lm": (),
    "filters": (),
    "forward-forward": ("goodness_choice_accuracy",),
    "hidden-distillation": (),
    "logit-distillation": (),
    "masked-lm": (),
    "masked-units": (),
    "turned-classification": (),
    "router-lm": (),
    "token-router-lm": (),
    "mono-forward": ("goodness_sum_accuracy", "last_readout_accuracy"),
}
POLICIES: dict[str, tuple[str, ...]] = {
    "clip-parameters": (),
    "freeze": ("trained_share",),
    "gradient-norms": ("grad_norm_variation", "fc2_grad_ratio"),
    "growth": (),
    "keep-zeros": ("nonzero", "density"),
    "layer-cost": ("layer_tokens", "layer_cost"),
    "layer-dropout": (),
    "ledger": ("param_bytes", "grad_bytes", "optimizer_bytes", "activation_bytes", "state_bytes", "train_flops"),
    "loqt": ("update_bytes",),
    "per-layer-updates": (),
    "random-ltd": ("layer_token_share",),
    "capacity-rates": (),
    "importance-rates": (),
    "restart-adapters": (),
    "rotation": ("rotation_mean", "rotation_min", "turn_mean"),
}
ANALYSES: dict[str, tuple[str, ...]] = {
    "angular-distance": ("angular_distance_mean", "angular_distance_deep"),
    "attention-entropy": ("attention_entropy",),
    "bits-curve": ("curve_loss", "curve_added"),
    "cache-spectrum": ("key_lost_half", "key_lost_80", "value_lost_half", "value_lost_80"),
    "cache-errors": ("key_error", "value_error", "cache_loss"),
    "block-drop": ("block_loss", "block_loss_added"),
    "block-sweep": ("whole_loss", "angular_regret_mean"),
    "gradient-norms": ("grad_norm_variation",),
    "gradient-variance": ("head_variance_share",),
    "group-importance": ("upper_half_share",),
    "inspect": ("angular_distance_mean", "angular_distance_deep", "grad_norm_variation", "params", "flops_per_*"),
    "layer-importance": ("first_last_top",),
    "layer-widths": ("prunable_weights", "kept_share"),
    "quantization-error": ("stream_error",),
    "layer-drop": ("whole_loss", "layer_drop_mean"),
    "stream-variance": ("stream_variance_last", "stream_growth", "gate_mean", "gates_closing"),
    "weight-sizes": ("cut_mass", "size_gap"),
}
EVALUATIONS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "error_rate", "loss", "*_accuracy"),
    "composition": ("mixed_val_loss", "this_val_loss", "other_val_loss"),
    "chain-search": (
        "oracle_accuracy",
        "accuracy",
        "kept_shorter",
        "corrected",
        "path_length",
        "distinct_layers",
        "evaluations",
        "usage_entropy",
    ),
    "continuation": (
        "bleu",
        "bleu_1",
        "*_bleu",
        "*_bleu_1",
        "token_accuracy",
        "val_loss",
        "layers_run",
        "tokens_per_second",
        "task_distance",
    ),
    "early-exits": ("exit_loss", "val_loss", "exit_gap"),
    "fusion-curve": ("curve_best", "curve_weight", "curve_mean", "curve_ends"),
    "ensemble-accuracy": ("accuracy", "accuracy_here", "accuracy_there"),
    "embedding-agreement": ("cosine", "rank_agreement"),
    "language-modeling": ("val_loss", "perplexity", "normalized_loss"),
    "linear-probe": ("probe_accuracy", "best_probe_accuracy"),
    "masked-lm": ("val_loss", "perplexity"),
    "token-routing": ("val_loss", "perplexity", "active_share", "flops_per_token", "flops_share", "ffn_share", "tokens_per_second"),
    "recall": ("recall_accuracy", "answer_loss", "cache_bytes", "cache_share"),
    "self-speculation": ("acceptance", "tokens_per_pass", "calls_share", "speedup", "identical", "tokens_per_second"),
    "multiple-choice": ("accuracy", "accuracy_normalized", "gold_log_likelihood"),
}


def measurable(kind: str, what: str, policies: Iterable[str] = ()) -> tuple[str, ...] | None:
    """The names (or patterns like `*_accuracy`) of what a stage can measure; None where that is not known beforehand.

    Args:
        kind, what: of the stage. policies: names of a training stage's policies.
    """
    if kind == "train":
        rows = [OBJECTIVES.get(what), *(POLICIES.get(name) for name in policies)]
        return None if None in rows else TRAINING + tuple(name for row in rows for name in row or ())
    return {"analyze": ANALYSES.get(what), "evaluate": EVALUATIONS.get(what), "export": EXPORT}.get(kind, ())


def is_among(metric: str, names: Iterable[str]) -> bool:
    """Whether a metric is one of those names or fits one of those patterns."""
    return any(fnmatch.fnmatchcase(metric, name) for name in names)
