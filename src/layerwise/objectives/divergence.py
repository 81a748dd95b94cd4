"""How far a student's distribution is from a teacher's: over the classes, or over every token's successor."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from layerwise.errors import BadInput
from layerwise.models.heads import LMHead
from layerwise.models.model import Model, Output
from layerwise.objectives.cross_entropy import CHUNK_ELEMENTS


def divergence(ours: Output, theirs: Output, temperature: float) -> Float[Tensor, ""]:
    """T^2 KL(softmax(z_teacher / T) || softmax(z_student / T)), the mean over rows, or over real positions where each has scores.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    student, teacher = ours.model, theirs.model
    if not isinstance(student.head, LMHead):
        with torch.no_grad():
            b = theirs.logits
        a = ours.logits
        if a.dim() == 3 and ours.mask is not None and a.shape[:2] == b.shape[:2]:
            a, b = a[ours.mask], b[ours.mask]
        return _summed(a.flatten(0, -2), b.flatten(0, -2), temperature) / max(a[..., 0].numel(), 1)
    mask = ours.mask if ours.mask is not None else torch.ones(ours.hidden.shape[:2], dtype=torch.bool, device=ours.hidden.device)
    a, b = ours.hidden[mask], theirs.hidden[mask]
    rows = max(1, CHUNK_ELEMENTS // len(student.token_matrix))
    # Scores of a few rows at a time, made again in the backward pass: all of them never exist at once.
    parts = [
        checkpoint(_scored, student, a[i : i + rows], teacher, b[i : i + rows], temperature, use_reentrant=False)
        for i in range(0, len(a), rows)
    ]
    return torch.stack(parts).sum() / max(len(a), 1) if parts else a.sum()


def _scored(student: Model, a: Tensor, teacher: Model, b: Tensor, temperature: float) -> Tensor:
    with torch.no_grad():
        wanted = teacher.head(b, teacher.token_matrix)  # type: ignore[misc]
    return _summed(student.head(a, student.token_matrix), wanted, temperature)  # type: ignore[misc]


def _summed(ours: Float[Tensor, "n classes"], theirs: Float[Tensor, "n classes"], temperature: float) -> Float[Tensor, ""]:
    if ours.shape != theirs.shape:
        raise BadInput(f"the student scores {ours.shape[-1]} classes or tokens, the teacher {theirs.shape[-1]}; they must agree")
    exact = torch.promote_types(ours.dtype, torch.float32)
    a, b = ((s.to(exact) / temperature).log_softmax(dim=-1) for s in (ours, theirs))
    return F.kl_div(a, b, reduction="sum", log_target=True) * temperature**2
