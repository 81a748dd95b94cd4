"""Small heads on one vector that predict several others from it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class PredictionHeads(nn.Module):
    """(..., width) -> (heads, ..., outer): a linear map to `heads` slices, GELU, and for each slice a linear map of its own.

    Source: Chang, Yang and Lee 2022, "DistilHuBERT" (arXiv 2110.01900), section 2.2, and its published code (the split linear).
    """

    def __init__(self, width: int, outer: int, heads: int, seed: int = 0) -> None:
        super().__init__()
        self.expand = nn.Linear(width, heads * outer)
        self.weight = nn.Parameter(torch.empty(heads, outer, outer))
        self.bias = nn.Parameter(torch.empty(heads, outer))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor, inner in ((self.expand.weight, width), (self.expand.bias, width), (self.weight, outer), (self.bias, outer)):
                tensor.uniform_(-(inner**-0.5), inner**-0.5, generator=generator)

    def forward(self, z: Float[Tensor, "*n width"]) -> Float[Tensor, "heads *n outer"]:
        heads, outer = self.bias.shape
        slices = F.gelu(self.expand(z)).unflatten(-1, (heads, outer)).movedim(-2, 0)
        made = torch.baddbmm(self.bias[:, None], slices.flatten(1, -2), self.weight.transpose(1, 2))
        return made.unflatten(1, z.shape[:-1])
