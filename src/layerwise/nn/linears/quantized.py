"""Matrices in few bits, 4-bit NormalFloat or whole numbers on a grid: stored packed, unpacked for the product and dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.nn.integers import Grid, find_grid
from layerwise.nn.linear import Linear
from layerwise.nn.nf4 import NF4, dequantize, quantize, sizes
from layerwise.nn.packing import pack, packed_bytes, unpack
from layerwise.stack.parts_spec import LinearSpec


class Packed(nn.Module):
    """A frozen matrix in NF4. Its buffers are the packed bytes themselves, in memory as in a checkpoint.

    Args:
        shape: of the matrix. double: whether the scales are quantized too.
    """

    codes: Tensor
    scales: Tensor
    second: Tensor | None

    def __init__(self, shape: tuple[int, int], block: int, double: bool = False) -> None:
        super().__init__()
        self.shape, self.block = shape, block
        codes, scales, second = sizes(shape[0] * shape[1], block, double)
        self.register_buffer("codes", torch.empty(codes, dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(scales, dtype=torch.uint8 if double else torch.float32))
        self.register_buffer("second", torch.empty(second) if double else None)

    def store(self, matrix: Tensor) -> None:
        """Quantize `matrix` into the buffers."""
        made = quantize(matrix, self.block, self.second is not None)
        self.codes, self.scales, self.second = made.codes, made.scales, made.second

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, unpacked."""
        return dequantize(
            NF4(self.codes, self.scales.float() if self.second is None else self.scales, self.second), self.shape, self.block, dtype
        )


class Integers(nn.Module):
    """A frozen matrix of whole numbers on a grid. Its buffers are the packed bytes themselves, in memory as in a checkpoint.

    Args:
        shape: of the matrix, (out, in). bits: of a number. group: inputs of a row that share a scale and a zero (None: all).
        indexed: `of` holds the group of every input; else groups are runs of neighbours.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    of: Tensor | None

    def __init__(self, shape: tuple[int, int], bits: int, group: int | None = None, indexed: bool = False) -> None:
        super().__init__()
        self.shape, self.bits = shape, bits
        self.group = shape[1] if group is None else group
        groups = -(-shape[1] // self.group)
        self.register_buffer("codes", torch.empty(packed_bytes(shape[0] * shape[1], bits), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(shape[0], groups, dtype=torch.float16))
        self.register_buffer("zeros", torch.empty(packed_bytes(shape[0] * groups, bits), dtype=torch.uint8))
        self.register_buffer("of", torch.empty(shape[1], dtype=torch.int32) if indexed else None)

    def put(self, codes: Tensor, grid: Grid) -> None:
        """Take over codes (out, in) on a grid."""
        self.codes, self.zeros = pack(codes, self.bits), pack(grid.zeros, self.bits)
        self.scales = grid.scales.to(torch.float16)
        if self.of is not None:  # an index that nothing new is given for is that of neighbours
            neighbours = torch.arange(self.shape[1], device=codes.device) // self.group
            self.of = (neighbours if grid.of is None else grid.of).to(torch.int32)

    def store(self, matrix: Tensor) -> None:
        """Round `matrix` to the nearest numbers."""
        grid = find_grid(matrix, self.bits, self.group)
        self.put(grid.nearest(matrix.float()), grid)

    def grid(self) -> Grid:
        """The values that the matrix may have."""
        zeros = unpack(self.zeros, self.bits, self.scales.numel()).view(self.scales.shape).float()
        return Grid(self.scales.float(), zeros, self.bits, self.group, self.of)

    def numbers(self) -> Tensor:
        """The codes, (out, in) uint8."""
        return unpack(self.codes, self.bits, self.shape[0] * self.shape[1]).view(self.shape)

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, unpacked."""
        return self.grid().values(self.numbers()).to(dtype)


class _Product(torch.autograd.Function):
    """x W^T with a packed W, unpacked anew in the backward pass. `received`, if given, is handed dL/dW (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Any, received: Any, anchor: Tensor | None) -> Tensor:
        ctx.stored, ctx.received = stored, received
        if received is not None:
            ctx.save_for_backward(x)
        return x @ stored.matrix(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        dx = dy @ ctx.stored.matrix(dy.dtype) if ctx.needs_input_grad[0] else None
        if ctx.received is not None:
            (x,) = ctx.saved_tensors
            ctx.received((dy.flatten(0, -2).t() @ x.flatten(0, -2)).float())
        return dx, None, None, None


def packed_linear(x: Tensor, stored: Any, bias: Tensor | None = None, received: Any = None) -> Tensor:
    """x W^T + bias, W what `stored.matrix(dtype)` gives; only the packed form is kept for the backward pass.

    Args:
        received: called with the gradient of W in the backward pass (None: it is not computed).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    # The anchor makes autograd come here even if nothing below is trained.
    anchor = None if received is None else torch.zeros((), device=x.device, requires_grad=True)
    y = _Product.apply(x, stored, received, anchor)
    return y if bias is None else y + bias


class Quantized(Linear):
    """A frozen matrix in NF4 (Dettmers et al. 2023, "QLoRA", section 3) or, of a kind that begins with `packed`, in whole numbers."""

    def __init__(self, inner: int, outer: int, bias: bool, spec: LinearSpec) -> None:
        super().__init__(inner, outer, bias)
        integers = spec.kind.startswith("packed")
        self.base: Any = (
            Integers((outer, inner), spec.bits, spec.group, spec.indexed) if integers else Packed((outer, inner), spec.block, spec.double)
        )

    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.base, self.bias)

    def materialize(self) -> Tensor:
        return self.base.matrix()

    def store(self, matrix: Tensor, generator: torch.Generator) -> None:
        """Take over a dense matrix (out, in); what is trained beside it starts anew."""
        self.base.store(matrix)

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """A normal matrix with standard deviation `std`, quantized; zero bias."""
        drawn = torch.empty(self.out_features, self.in_features, device=generator.device)
        self.store(drawn.normal_(std=std, generator=generator), generator)
        self._zero_bias()


class QLoRA(Quantized):
    """A frozen packed matrix plus a trained low-rank term: y = Q x + (alpha / rank) B A dropout(x).

    Source: Dettmers et al. 2023, "QLoRA", equation 5.
    """

    def __init__(self, inner: int, outer: int, bias: bool, spec: LinearSpec) -> None:
        super().__init__(inner, outer, bias, spec)
        assert spec.rank is not None
        self.scale = (spec.alpha if spec.alpha is not None else spec.rank) / spec.rank
        self.dropout = nn.Dropout(spec.dropout)
        self.lora_a = nn.Parameter(torch.empty(spec.rank, inner))
        self.lora_b = nn.Parameter(torch.empty(outer, spec.rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)

    def materialize(self) -> Tensor:
        return super().materialize() + self.scale * self.lora_b @ self.lora_a

    @torch.no_grad()
    def store(self, matrix: Tensor, generator: torch.Generator) -> None:
        super().store(matrix, generator)
        self.reset_adapter(generator)

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator) -> None:
        """A uniform as in nn.Linear (bound 1/sqrt(in)), B zero."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.lora_a, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_b)

    @torch.no_grad()
    def fold(self, generator: torch.Generator) -> None:
        """Add the low-rank term to the matrix, quantize the sum and start the term anew."""
        self.store(self.materialize(), generator)
