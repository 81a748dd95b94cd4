"""Supervised classification of whole inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from layerwise.errors import BadInput
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective


class Classification(Objective):
    """Cross-entropy of the class scores against `labels` (b,); metric `accuracy`.

    Args:
        smoothing: label smoothing (Szegedy et al. 2016).
    """

    def __init__(self, data: Any = None, *, smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise BadInput(f"smoothing is in [0, 1); it is {smoothing}")
        self.smoothing = smoothing

    def forward(self, model: nn.Module, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        logits, labels = model(batch, **context).logits, batch["labels"]
        total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.smoothing)
        correct = (logits.argmax(dim=1) == labels).sum()
        return Loss(total, torch.tensor(len(labels), device=total.device), {"accuracy": correct})
