"""Classifiers that vote."""

from __future__ import annotations

from typing import Any

from layerwise.analyze.findings import Findings
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.load import load_any
from layerwise.models.model import Model


def ensemble_accuracy(
    model: Model, data: Any, *, other: str, split: str = "validation", batch: int = 256, batches_at_most: int | None = None
) -> Findings:
    """Accuracy of the mean of two classifiers' probabilities, and of each: `accuracy`, `accuracy_here`, `accuracy_there`.

    Args:
        other: a checkpoint's folder; in a job also `stage:NAME`.
    """
    second = load_any(other, str(model.device))
    hits = [0.0, 0.0, 0.0]
    count = 0
    with inference(model), inference(second):
        for rows in batches(split_of(data, split), batch, batches_at_most, model.device):
            here, there = (m(rows).logits.softmax(dim=1) for m in (model, second))
            for k, scores in enumerate((here + there, here, there)):
                hits[k] += (scores.argmax(dim=1) == rows["labels"]).sum().item()
            count += len(here)
    return Findings(dict(zip(("accuracy", "accuracy_here", "accuracy_there"), (h / count for h in hits), strict=True)))
