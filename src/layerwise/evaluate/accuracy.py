"""How well a classifier classifies."""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F

from layerwise.analyze.findings import Findings
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model


def classification(
    model: Model, data: Any, *, splits: tuple[str, ...] = ("validation",), batch: int = 256, batches_at_most: int | None = None
) -> Findings:
    """Accuracy and cross-entropy on splits.

    Metrics: `accuracy`, `error_rate` and `loss` of the first split, and `<split>_accuracy` of every split.
    """
    found: dict[str, float] = {}
    for split in splits:
        correct = total = count = 0.0
        with inference(model):
            for rows in batches(split_of(data, split), batch, batches_at_most, model.device):
                logits = model(rows).logits
                correct += (logits.argmax(dim=1) == rows["labels"]).sum().item()
                total += F.cross_entropy(logits, rows["labels"], reduction="sum").item()
                count += len(logits)
        if not found:
            found = {"accuracy": correct / count, "error_rate": 1 - correct / count, "loss": total / count}
        found[f"{split}_accuracy"] = correct / count
    return Findings(found)
