"""Pre-training a student on masked tokens while its hidden states follow a teacher's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.models.model import Output
from layerwise.objectives.language import MaskedLM, score_labels
from layerwise.objectives.loss import Loss
from layerwise.objectives.teacher import Teacher
from layerwise.stack.context import Call, Context


class DistilledMaskedLM(MaskedLM):
    """Masked-token cross-entropy plus the mean squared distance of every hidden state, the embedding's among them, to the teacher's.

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
        ours, states = _with_states(model, masked, context)
        _, targets = _with_states(lambda b, **c: self.teacher(b, ours.hidden.device, **c), masked, {})
        loss = score_labels(ours.model, ours.hidden, labels)
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(labels, dtype=torch.bool)
        distance: Tensor = torch.stack([F.mse_loss(a[real], b[real]) for a, b in zip(states, targets, strict=True)]).mean()
        # The distance is a mean already; a loss is a sum over the labelled tokens.
        return Loss(loss.total + self.weight * distance * loss.count, loss.count, {"distance": (distance * loss.count).detach()})


def _with_states(run: Callable[..., Output], batch: Mapping[str, Any], context: dict[str, Any]) -> tuple[Output, list[Tensor]]:
    """What `run` makes of a batch, and its hidden states: what the first layer gets, then what every layer hands on."""
    first: list[Tensor] = []

    def keep(i: int, layer: nn.Module, x: Tensor, ctx: Context, call: Call) -> Tensor:
        if i == 0:
            first.append(x)
        return call(x, ctx)

    out = run(batch, hiddens=True, **{**context, "around": (keep, *context.get("around", ()))})
    return out, [*first, *(out.hiddens or ())]
