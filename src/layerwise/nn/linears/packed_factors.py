"""A product of two thin matrices, each of whole numbers on a grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwise.nn.linear import Linear
from layerwise.nn.linears.quantized import Integers, packed_linear
from layerwise.stack.parts_spec import LinearSpec


class PackedLowRank(Linear):
    """y = s B A x with s = alpha / rank, both factors frozen and packed: a low-rank matrix after quantization."""

    def __init__(self, inner: int, outer: int, bias: bool, spec: LinearSpec) -> None:
        super().__init__(inner, outer, bias)
        assert spec.rank is not None
        self.scale = (spec.alpha if spec.alpha is not None else spec.rank) / spec.rank
        self.factor_a = Integers((spec.rank, inner), spec.bits, spec.group)
        self.factor_b = Integers((outer, spec.rank), spec.bits, spec.group)

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(self.scale * packed_linear(x, self.factor_a), self.factor_b, self.bias)

    def materialize(self) -> Tensor:
        return self.scale * self.factor_b.matrix() @ self.factor_a.matrix()

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """Normal factors whose product has entries of standard deviation `std`, quantized; zero bias."""
        each = (std / (self.scale * self.factor_a.shape[0] ** 0.5)) ** 0.5
        for factor in (self.factor_a, self.factor_b):
            factor.store(nn.init.normal_(torch.empty(factor.shape, device=generator.device), std=each, generator=generator))
        self._zero_bias()
