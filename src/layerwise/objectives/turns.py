"""Several targets of one image at once: its class, how it was turned, how it was dimmed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from layerwise.data.turns import LEVELS, turned
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective


class TurnedClassification(Objective):
    """CE of the class, of the quarter turns (4) and of the brightness (4 levels) of images that were turned and dimmed at random.

    The class is scored by the model's head, the others by linear heads of the objective's own on the same pooled vector. It leaves hidden
    states that hold more than the class: a teacher for comparing what distillation does with what a task does not need. Source of the turns:
    Gidaris, Singh and Komodakis 2018.

    Args:
        others: weight of the two other cross-entropies.
    """

    def __init__(self, data: Any = None, *, others: float = 1.0) -> None:
        super().__init__()
        self.others = others
        self.heads: nn.ModuleDict | None = None

    def attach(self, model: Any, batch: Mapping[str, Any]) -> None:
        with torch.no_grad():
            width = model(batch).pooled.shape[1]
        self.heads = nn.ModuleDict({"quarters": nn.Linear(width, 4), "levels": nn.Linear(width, len(LEVELS))})
        generator = torch.Generator().manual_seed(0)
        for linear in self.heads.values():
            for parameter in linear.parameters():
                nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
        self.heads.to(model.device)

    def forward(self, model: Any, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        if self.heads is None:
            self.attach(model, batch)
        assert self.heads is not None
        pixels, quarters, levels = turned(batch["pixel_values"], generator)
        out = model({**batch, "pixel_values": pixels}, **context)
        pooled, labels = out.pooled, batch["labels"]
        total = F.cross_entropy(out.logits, labels, reduction="sum")
        for name, target in (("quarters", quarters), ("levels", levels)):
            total = total + self.others * F.cross_entropy(self.heads[name](pooled), target, reduction="sum")
        right = {
            "accuracy": (out.logits.argmax(dim=1) == labels).sum(),
            "quarters_accuracy": (self.heads["quarters"](pooled).argmax(dim=1) == quarters).sum(),
        }
        return Loss(total, torch.tensor(len(labels), device=total.device), right)
