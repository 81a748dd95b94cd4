"""Squared hinge losses of class scores, in the two forms that go by that name."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def one_vs_all_hinge(scores: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Sum over samples and classes k of max(0, 1 - t_k s_k)^2, t_k = 1 for the right class and -1 for the others (L2-SVM)."""
    sign = 2.0 * F.one_hot(labels, scores.shape[1]).to(scores.dtype) - 1.0
    return (1 - sign * scores).clamp(min=0).square().sum()


def multiclass_hinge(scores: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Sum over samples and wrong classes k of max(0, 1 - (s_y - s_k))^2 (Crammer and Singer's margins, squared)."""
    margin = (1 - scores.gather(1, labels[:, None]) + scores).clamp(min=0).square()
    return margin.masked_fill(F.one_hot(labels, scores.shape[1]).bool(), 0.0).sum()


def cross_entropy(scores: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Sum over samples of -log softmax."""
    return F.cross_entropy(scores, labels, reduction="sum")


CLASS_LOSSES = {"cross-entropy": cross_entropy, "hinge": one_vs_all_hinge, "multiclass-hinge": multiclass_hinge}


def right(scores: Tensor, labels: Tensor) -> Tensor:
    """Number of samples whose highest score is the right class."""
    return (scores.argmax(dim=1) == labels).sum().to(torch.float32)
