"""How far two encoders agree on what texts mean."""

from __future__ import annotations

from typing import Any

import torch
from scipy import stats
from torch.nn import functional as F

from layerwise.analyze.findings import Findings
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.load import load_any
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec


def embedding_agreement(
    model: Model, data: Any, *, other: str, split: str = "validation", batch: int = 32, batches_at_most: int | None = 16
) -> Findings:
    """Pooled vectors of rows of text, compared with those of another model.

    Metrics: `cosine`, the mean cosine of the two vectors of a row; `rank_agreement`, Spearman's correlation of the similarities
    of all pairs of rows in the one model and the other: whether the same texts are neighbours.

    Args:
        other: a checkpoint's folder; in a job also `stage:NAME`.
    """
    reference = load_any(other, str(model.device))
    check_agreement(model.spec, other=reference.spec)
    ours, theirs = [], []
    with inference(model), inference(reference):
        for rows in batches(split_of(data, split), batch, batches_at_most, model.device):
            ours.append(F.normalize(model(rows).pooled.float(), dim=-1))
            theirs.append(F.normalize(reference(rows).pooled.float(), dim=-1))
    a, b = torch.cat(ours), torch.cat(theirs)
    upper = torch.ones(len(a), len(a), dtype=torch.bool).triu(1)
    found = {"cosine": (a * b).sum(dim=1).mean().item()} if a.shape == b.shape else {}
    if len(a) > 2:
        found["rank_agreement"] = float(stats.spearmanr((a @ a.T).cpu()[upper], (b @ b.T).cpu()[upper]).statistic)
    return Findings(found)


def check_agreement(spec: ModelSpec, *, other: ModelSpec, **_: Any) -> None:
    """Raises BadInput: it is not known how one of the models makes one vector of a text."""
    for each in (spec, other):
        each.pooling  # noqa: B018 - raises
