"""Learning from a teacher: its hidden states, or its distribution over classes or tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from layerwise.errors import BadInput
from layerwise.models.heads import LMHead
from layerwise.models.model import Model, Output
from layerwise.objectives.cross_entropy import CHUNK_ELEMENTS
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective
from layerwise.objectives.teacher import Teacher

Distance = Literal["mse", "cosine"]


class HiddenDistillation(Objective):
    """Each position's hidden vectors are drawn to the teacher's, averaged over pairs of layers.

    Source: Jiao et al. 2020, "TinyBERT", equation 8 (mse), without its projection: student and teacher have the same width.

    Args:
        teacher: a checkpoint's folder; in a job also `stage:NAME`, the model as that stage left it.
        pairs: student layer -> teacher layer, negative from the top (None: what leaves the last layer and its norm, from both).
        distance: `mse`, the mean over the width; or `cosine`, 1 - cosine.
    """

    def __init__(self, data: Any = None, *, teacher: str, pairs: dict[int, int] | None = None, distance: Distance = "mse") -> None:
        super().__init__()
        self.teacher, self.pairs, self.distance = Teacher(teacher), pairs, distance

    def forward(self, model: Model, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        inner = self.pairs is not None
        ours = model(batch, hiddens=inner, **context)
        theirs = self.teacher(batch, ours.hidden.device, hiddens=inner)
        mask = ours.mask if ours.mask is not None else torch.ones(ours.hidden.shape[:2], dtype=torch.bool, device=ours.hidden.device)
        couples = [(_layer(ours, a), _layer(theirs, b)) for a, b in self.pairs.items()] if self.pairs else [(ours.hidden, theirs.hidden)]
        total = torch.stack([self._distance(a[mask], b[mask]) for a, b in couples]).mean()
        return Loss(total, mask.sum())

    def _distance(self, ours: Float[Tensor, "n width"], theirs: Float[Tensor, "n width"]) -> Float[Tensor, ""]:
        if ours.shape != theirs.shape:
            raise BadInput(f"the student's hidden vectors have width {ours.shape[-1]}, the teacher's {theirs.shape[-1]}; they must agree")
        if self.distance == "cosine":
            return (1 - F.cosine_similarity(ours, theirs, dim=-1)).sum()
        return F.mse_loss(ours, theirs.to(ours.dtype), reduction="none").mean(dim=-1).sum()


class LogitDistillation(Objective):
    """KL(teacher || student) of softened distributions, temperature^2 times: of every token's successor, or of the classes.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Args:
        teacher: as for `HiddenDistillation`.
        temperature: both distributions are softened by it.
    """

    def __init__(self, data: Any = None, *, teacher: str, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise BadInput(f"temperature is above 0; it is {temperature}")
        self.teacher, self.temperature = Teacher(teacher), temperature

    def forward(self, model: Model, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        ours = model(batch, **context)
        theirs = self.teacher(batch, ours.hidden.device)
        if not isinstance(model.head, LMHead):
            return Loss(self._divergence(ours.logits, theirs.logits), torch.tensor(len(ours.hidden), device=ours.hidden.device))
        mask = ours.mask if ours.mask is not None else torch.ones(ours.hidden.shape[:2], dtype=torch.bool, device=ours.hidden.device)
        a, b = ours.hidden[mask], theirs.hidden[mask]
        rows = max(1, CHUNK_ELEMENTS // len(model.token_matrix))
        # Scores of a few rows at a time, made again in the backward pass: all of them never exist at once.
        total = sum(
            checkpoint(self._scored, model, a[i : i + rows], theirs.model, b[i : i + rows], use_reentrant=False)
            for i in range(0, len(a), rows)
        )
        return Loss(total, mask.sum())

    def _scored(self, student: Model, a: Tensor, teacher: Model, b: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher.head(b, teacher.token_matrix)  # type: ignore[misc]
        return self._divergence(student.head(a, student.token_matrix), wanted)  # type: ignore[misc]

    def _divergence(self, ours: Float[Tensor, "n classes"], theirs: Float[Tensor, "n classes"]) -> Float[Tensor, ""]:
        if ours.shape != theirs.shape:
            raise BadInput(f"the student scores {ours.shape[-1]} classes or tokens, the teacher {theirs.shape[-1]}; they must agree")
        a, b = ((s.float() / self.temperature).log_softmax(dim=-1) for s in (ours, theirs))
        return F.kl_div(a, b, reduction="sum", log_target=True) * self.temperature**2


def _layer(output: Output, index: int) -> Tensor:
    hiddens = output.hiddens or ()
    if not -len(hiddens) <= index < len(hiddens):
        raise BadInput(f"pairs names layer {index}; there are layers 0 to {len(hiddens) - 1}")
    return hiddens[index]
