"""A matrix that is a product of two thin ones, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.nn.linear import Linear
from layerwise.stack.parts_spec import LinearSpec


class LowRank(Linear):
    """y = s B A x with s = alpha / rank, both factors trained: the low-rank baseline of Han et al. 2024 (table 2).

    A and B are normal, so that the product's entries have the standard deviation a dense matrix would have: with B at zero,
    as an adapter has it, no signal would pass.
    """

    def __init__(self, inner: int, outer: int, bias: bool, spec: LinearSpec) -> None:
        super().__init__(inner, outer, bias)
        assert spec.rank is not None
        self.scale = (spec.alpha if spec.alpha is not None else spec.rank) / spec.rank
        self.factor_a = nn.Parameter(torch.empty(spec.rank, inner))
        self.factor_b = nn.Parameter(torch.empty(outer, spec.rank))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.scale * F.linear(x, self.factor_a), self.factor_b, self.bias)

    def materialize(self) -> Tensor:
        return self.scale * self.factor_b @ self.factor_a

    def initialize(self, std: float, generator: torch.Generator) -> None:
        each = (std / (self.scale * self.factor_a.shape[0] ** 0.5)) ** 0.5
        for factor in (self.factor_a, self.factor_b):
            nn.init.normal_(factor, std=each, generator=generator)
        self._zero_bias()
