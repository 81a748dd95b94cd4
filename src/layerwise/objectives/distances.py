"""How far a student's vectors are from a teacher's."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from layerwise.errors import BadInput

Distance = Literal["mse", "cosine", "l1-cosine"]


def distances(
    kind: Distance, ours: Float[Tensor, "*n width"], theirs: Float[Tensor, "*n width"], *, cosine: float = 1.0
) -> Float[Tensor, "*n"]:
    """One distance for each pair of vectors; none is compared with another's.

    `mse` is the mean of squared differences, `cosine` 1 - cosine, and `l1-cosine` the mean of absolute differences minus `cosine` times the
    log-sigmoid of the cosine, which is least where both agree: log(1 + 1/e) then, not 0.

    Raises:
        BadInput: vectors of different sizes, or different numbers of them.

    Sources: Jiao et al. 2020, "TinyBERT", equation 8 (mse); Chang, Yang and Lee 2022, "DistilHuBERT" (arXiv 2110.01900), equation 1 (l1-cosine).
    """
    if ours.shape[-1] != theirs.shape[-1]:
        raise BadInput(f"the student's hidden vectors have width {ours.shape[-1]}, the teacher's {theirs.shape[-1]}; they must agree")
    if ours.shape != theirs.shape:
        raise BadInput(f"the student has hidden vectors {tuple(ours.shape[:-1])}, the teacher {tuple(theirs.shape[:-1])}; they must agree")
    theirs = theirs.to(ours.dtype)
    if kind == "mse":
        return F.mse_loss(ours, theirs, reduction="none").mean(dim=-1)
    turned = F.cosine_similarity(ours, theirs, dim=-1)
    if kind == "cosine":
        return 1 - turned
    return (ours - theirs).abs().mean(dim=-1) - cosine * F.logsigmoid(turned)
