"""Matrices and inputs of one bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import BadInput
from layerwise.nn.binarize import Elastic, binary_weight
from layerwise.nn.linear import Dense, Linear
from layerwise.nn.packing import pack, packed_bytes, unpack
from layerwise.stack.parts_spec import LinearSpec


class Binary(Dense):
    """y = alpha sign(x + shift) Wb^T + b with Wb = mean|W| sign(W - mean W); W, shift (in,), alpha and b are trained.

    Source: Xing et al. 2024, "BiPFT", section "Preliminaries" (arXiv 2312.08937).
    """

    def __init__(self, inner: int, outer: int, bias: bool, spec: LinearSpec) -> None:
        super().__init__(inner, outer, bias)
        self.shift = nn.Parameter(torch.empty(inner))
        self.inputs = Elastic()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inputs(x + self.shift), self.materialize(), self.bias)

    def materialize(self) -> Tensor:
        """The binary matrix; its inputs have to be binarized too."""
        return binary_weight(self.weight)

    def merge(self) -> Dense:
        raise BadInput("a binary linear binarizes its inputs too: no dense matrix computes the same; pack it instead (edit: pack-binary)")

    def initialize(self, std: float, generator: torch.Generator) -> None:
        super().initialize(std, generator)
        self.reset_inputs(generator)

    def reset_inputs(self, generator: torch.Generator) -> None:
        """No shift, and no scale of the inputs yet."""
        nn.init.zeros_(self.shift)
        self.inputs.initialize(0.0, generator)


class PackedBinary(Linear):
    """A trained `Binary` as it is kept and run: one bit a weight, eight to a byte, and one scale. The matrix is frozen."""

    bits: Tensor
    scale: Tensor

    def __init__(self, inner: int, outer: int, bias: bool, spec: LinearSpec) -> None:
        super().__init__(inner, outer, bias)
        self.register_buffer("bits", torch.empty(packed_bytes(inner * outer, 1), dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(()))
        self.shift = nn.Parameter(torch.empty(inner))
        self.inputs = Elastic()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inputs(x + self.shift), self.materialize(), self.bias)

    def materialize(self) -> Tensor:
        signs = unpack(self.bits, 1, self.out_features * self.in_features).to(self.scale.dtype) * 2 - 1
        return self.scale * signs.view(self.out_features, self.in_features)

    def merge(self) -> Dense:
        raise BadInput("a binary linear binarizes its inputs too: no dense matrix computes the same")

    @torch.no_grad()
    def take(self, trained: Binary) -> None:
        """Become what `trained` is."""
        self.bits = pack((trained.weight - trained.weight.mean() >= 0).to(torch.uint8), 1)
        self.scale = trained.weight.abs().mean()
        self.shift, self.inputs, self.bias = trained.shift, trained.inputs, trained.bias

    def initialize(self, std: float, generator: torch.Generator) -> None:
        with torch.device(generator.device):
            fresh = Binary(self.in_features, self.out_features, self.bias is not None, LinearSpec("binary"))
        fresh.initialize(std, generator)
        self.take(fresh)
