"""Pre-training a student on masked tokens while its hidden states follow a teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.objectives.language import MaskedLM, score_labels
from layerwise.objectives.loss import Loss
from layerwise.objectives.teacher import Teacher


class DistilledMaskedLM(MaskedLM):
    """Masked-token cross-entropy plus the mean squared distance of every layer's output to the teacher's on the same masked text.

    Student and teacher have the same depth and width. Source: Xing et al. 2024, "BiPFT" (arXiv 2312.08937), without its
    next-sentence terms (this data has no sentence pairs) and with the teacher's dropout off.

    Args:
        teacher: a checkpoint's folder; in a job also `stage:NAME`. weight: of the distances.
        rate: share of tokens to predict.
    """

    def __init__(self, data: Any, *, teacher: str, weight: float = 1.0, rate: float = 0.15) -> None:
        super().__init__(data, rate=rate)
        self.teacher, self.weight = Teacher(teacher), weight

    def forward(self, model: nn.Module, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        masked, labels = self.masked(batch, generator)
        ours = model(masked, hiddens=True, **context)
        theirs = self.teacher(masked, ours.hidden.device, hiddens=True)
        loss = score_labels(ours.model, ours.hidden, labels)
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(labels, dtype=torch.bool)
        pairs = zip(ours.hiddens or (), theirs.hiddens or (), strict=True)
        distance: Tensor = torch.stack([F.mse_loss(a[real], b[real]) for a, b in pairs]).mean()
        # The distance is a mean already; a loss is a sum over the labelled tokens.
        return Loss(loss.total + self.weight * distance * loss.count, loss.count, {"distance": (distance * loss.count).detach()})
