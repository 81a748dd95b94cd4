"""How well two language models predict held-out text together, and each alone."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn import functional as F

from layerwise.analyze.findings import Findings
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.infer.ensemble import mean_logits
from layerwise.models.load import load_any
from layerwise.models.model import Model

Combine = Literal["logits", "probabilities", "best"]


def composition(
    model: Model,
    data: Any,
    *,
    other: str,
    combine: Combine = "logits",
    split: str = "validation",
    batch: int = 16,
    batches_at_most: int | None = None,
) -> Findings:
    """Next-token prediction by two models at once.

    Metrics: `mixed_val_loss` of the combination (nats a token), `this_val_loss` and `other_val_loss` of each alone.

    Args:
        other: the second model: a checkpoint's folder; in a job also `stage:NAME`, the model as that stage left it.
        combine: average the `logits` or the `probabilities`; `best` is the one of the two that is better on the whole split.
    """
    second = load_any(other, str(model.device))
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    with inference(model), inference(second):
        for rows in batches(split_of(data, split), batch, batches_at_most, model.device):
            ids = rows["input_ids"]
            scores = [m(rows).logits[:, :-1].flatten(0, 1).log_softmax(dim=-1) for m in (model, second)]
            if combine == "probabilities":
                joint = torch.stack(scores).logsumexp(dim=0)
            else:
                joint = mean_logits([model, second], rows)[:, :-1].flatten(0, 1)
            target = ids[:, 1:].flatten()
            sums += torch.tensor([F.cross_entropy(s, target, reduction="sum").item() for s in (joint, *scores)], dtype=torch.float64)
            count += target.numel()
    mixed, this, that = (sums / count).tolist()
    return Findings({"mixed_val_loss": min(this, that) if combine == "best" else mixed, "this_val_loss": this, "other_val_loss": that})
