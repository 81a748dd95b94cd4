"""A quantized matrix with an adapter of which one factor is a gradient's directions and the other is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.nn.linear import Linear
from layerwise.nn.linears.quantized import Packed, packed_linear
from layerwise.stack.parts_spec import LinearSpec


class Full(nn.Module):
    """A frozen matrix as it is: what `Packed` is without quantization."""

    weight: Tensor

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(shape))

    def store(self, matrix: Tensor) -> None:
        """Keep a copy of `matrix`."""
        self.weight = matrix.detach().clone()

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.weight if dtype is None else self.weight.to(dtype)


class Opened:
    """What a linear reads, and hears, from the moment its adapter is merged until it has new directions.

    Attributes:
        base: the merged matrix, quantized. gradient: dL/dQ (out, in) so far.

    Args:
        heard: called in the backward pass, once every forward pass has been answered.
    """

    def __init__(self, base: Packed | Full, heard: Callable[[], None] | None) -> None:
        self.base, self.heard = base, heard
        self.gradient: Tensor | None = None
        self.awaited = 0

    def __call__(self, gradient: Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
        self.awaited -= 1
        if self.heard is not None and not self.awaited:
            self.heard()


class LoQT(Linear):
    """y = Q x + s B A x, with s = alpha itself (not divided by the rank). Q and one factor, P, are frozen; the other, F, is trained.

    Where in <= out, P is A (rank, in); otherwise P is B (out, rank). P holds the first singular directions of a recent gradient
    and is set, with Q and F, at a few steps of training (the policy `loqt`); before the first of them F is zero.
    Source: Loeschcke et al. 2024, "LoQT: Low-Rank Adapters for Quantized Pretraining", sections 3.1-3.3 (arXiv 2405.16528).

    Attributes:
        left: whether P stands on the input side.
        opened: while set, between `open` and `close`, the adapter is off and the dense gradient dL/dQ is listened for.
    """

    def __init__(self, inner: int, outer: int, bias: bool, spec: LinearSpec) -> None:
        super().__init__(inner, outer, bias)
        assert spec.rank is not None
        self.scale = 1.0 if spec.alpha is None else spec.alpha
        self.left = inner <= outer
        self.quantized = spec.store == "nf4"
        directions = (spec.rank, inner) if self.left else (outer, spec.rank)
        self.base: Packed | Full = Packed((outer, inner), spec.block, spec.double) if self.quantized else Full((outer, inner))
        self.directions: Packed | Full = Packed(directions, spec.block) if self.quantized else Full(directions)
        self.free = nn.Parameter(torch.empty((outer, spec.rank) if self.left else (spec.rank, inner)))
        self.opened: Opened | None = None

    def factors(self) -> tuple[Tensor, Tensor]:
        """(B, A): (out, rank) and (rank, in)."""
        fixed = self.directions.matrix(self.free.dtype)
        return (self.free, fixed) if self.left else (fixed, self.free)

    def forward(self, x: Tensor) -> Tensor:
        if self.opened is not None:
            self.opened.awaited += torch.is_grad_enabled()
            return packed_linear(x, self.opened.base, self.bias, self.opened)
        b, a = self.factors()
        return packed_linear(x, self.base, self.bias) + self.scale * F.linear(F.linear(x, a), b)

    def materialize(self) -> Tensor:
        b, a = self.factors()
        return self.base.matrix(self.free.dtype) + self.scale * b @ a

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """A normal matrix with standard deviation `std`; no directions yet, F zero, zero bias."""
        drawn = torch.empty(self.out_features, self.in_features, device=generator.device)
        self.store(drawn.normal_(std=std, generator=generator), generator)
        self._zero_bias()

    @torch.no_grad()
    def store(self, matrix: Tensor, generator: torch.Generator | None = None) -> None:
        """Take over a dense matrix (out, in), without an adapter: P and F are zero."""
        self.base.store(matrix)
        self.directions.store(torch.zeros(self.directions_shape, device=matrix.device))
        self.free.zero_()

    @property
    def directions_shape(self) -> tuple[int, int]:
        rank = self.free.shape[1 if self.left else 0]
        return (rank, self.in_features) if self.left else (self.out_features, rank)

    @torch.no_grad()
    def open(self, heard: Callable[[], None] | None = None) -> None:
        """Read the merged matrix, quantized, without an adapter, and listen for its dense gradient.

        Args:
            heard: called when the gradient is complete, if passes are not spread over several backward passes; it may `close`.
        """
        base = copy.deepcopy(self.base)
        base.store(self.materialize())
        self.opened = Opened(base, heard)

    @torch.no_grad()
    def close(self, compensations: int) -> None:
        """Merge for good: P from the gradient heard since `open`, F so that it repairs the quantization error.

        Args:
            compensations: rounds of error compensation (0, or without quantization: F = 0).
        """
        opened, self.opened = self.opened, None
        if opened is None or opened.gradient is None:
            raise RuntimeError("no gradient reached this linear since `open`")
        gradient, opened.gradient = opened.gradient, None  # autograd's graph still knows `opened`
        merged = self.materialize()
        self.base = opened.base
        rank = self.free.shape[1 if self.left else 0]
        u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
        self.directions.store(vh[:rank] if self.left else u[:, :rank])
        self.free.zero_()
        if self.quantized and compensations:
            self._compensate(merged.float(), compensations)

    def _compensate(self, merged: Tensor, rounds: int) -> None:
        """Alternate: quantize what the adapter does not explain, fit F to what quantization loses; the best round stays.

        F is the least-squares solution with the quantized P. Best so far begins with no adapter at all, so the error is never
        above plain quantization's. Source: section 3.2, after Li et al. 2023, "LoftQ".
        """
        fixed = self.directions.matrix().float()
        inverse = torch.linalg.pinv(fixed)
        best, kept = (merged - self.base.matrix(torch.float32)).norm(), None
        current = merged
        for _ in range(rounds):
            self.base.store(current)
            rest = merged - self.base.matrix(torch.float32)
            free = (rest @ inverse if self.left else inverse @ rest) / self.scale
            product = self.scale * (free @ fixed if self.left else fixed @ free)
            error = (rest - product).norm()
            if error < best:
                best, kept = error, (current, free)
            current = merged - product
        self.base.store(merged if kept is None else kept[0])
        if kept is not None:
            self.free.copy_(kept[1])
