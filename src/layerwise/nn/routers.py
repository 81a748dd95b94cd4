"""Small linear maps that decide what of a layer runs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.stack.parts_spec import RouterSpec


class Router(nn.Module):
    """w . x, or w . x + b: (..., width) -> (...) logits."""

    def __init__(self, width: int, spec: RouterSpec) -> None:
        super().__init__()
        self.start = spec.bias
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(())) if spec.bias is not None else None

    def forward(self, x: Float[Tensor, "*b width"]) -> Float[Tensor, "*b"]:
        logits = F.linear(x, self.weight[None]).squeeze(-1)
        return logits if self.bias is None else logits + self.bias

    def initialize(self) -> None:
        """Zero weight, and the bias that the spec names."""
        nn.init.zeros_(self.weight)
        if self.bias is not None and self.start is not None:
            nn.init.constant_(self.bias, self.start)
