"""Second moments of a linear's inputs over calibration tokens, and the correction for the error that inputs carry."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class Moments:
    """H = (2/n) sum w x x^T over tokens and, if inputs of the full-precision network are given too, D = (2/n) sum w (x_full - x) x^T.

    `size` is sum w |x|. Running means: adding batches one by one gives what all at once would.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.hessian: Float[Tensor, "in in"] = torch.zeros(width, width, device=device)
        self.cross: Float[Tensor, "in in"] = torch.zeros(width, width, device=device)
        self.size: Float[Tensor, " in"] = torch.zeros(width, device=device)
        self.rows = 0

    def add(
        self, x: Float[Tensor, "b s in"], weights: Float[Tensor, "b s"] | None = None, full: Float[Tensor, "b s in"] | None = None
    ) -> None:
        """Take in the tokens of some rows, weighted."""
        flat = x.flatten(0, -2).float()
        scaled = flat if weights is None else flat * weights.flatten()[:, None]
        keep, rows = self.rows / (self.rows + len(x)), self.rows + len(x)
        self.size += scaled.abs().sum(dim=0)
        self.hessian.mul_(keep).addmm_(scaled.t(), flat, alpha=2 / rows)
        if full is not None:
            self.cross.mul_(keep).addmm_((full.flatten(0, -2).float() - flat).t(), scaled, alpha=2 / rows)
        self.rows = rows


def corrected(
    weight: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], cross: Float[Tensor, "in in"], strength: float, damping: float = 1.0
) -> Float[Tensor, "out in"]:
    """W + strength W D (H + damping mean(diag H) I)^-1: on inputs that carry an error, closer to what W gives on inputs without.

    Source: Arai and Ichikawa 2025, "Quantization Error Propagation" (arXiv 2504.09629), with the damping of its published code.
    """
    if not strength or not bool(cross.any()):
        return weight
    h = hessian.clone()
    diagonal = torch.diagonal(h)
    diagonal[diagonal == 0] = 1.0
    h += damping * diagonal.mean() * torch.eye(len(h), device=h.device, dtype=h.dtype)
    return weight + strength * torch.linalg.solve(h, (weight.to(h.dtype) @ cross).t()).t().to(weight.dtype)
