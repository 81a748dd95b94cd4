"""Matrices of small whole numbers: w = scale (code - zero), with one scale and one zero for a group of neighbouring inputs of a row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from layerwise.errors import BadInput

WIDTHS = (2, 3, 4, 8)
SHRINKS, NORM = 80, 2.4
"""The search for a narrower range: factors 1, 0.99, ... 0.21, errors to this power. Source: GPTQ's published quantizer."""


@dataclass(frozen=True)
class Grid:
    """The values a matrix may take.

    Attributes:
        scales: of every row and group. zeros: the code of 0.0, whole numbers. bits: of a code. group: inputs in a group.
        of: the group of every input (None: runs of `group` neighbours).
    """

    scales: Float[Tensor, "out groups"]
    zeros: Float[Tensor, "out groups"]
    bits: int
    group: int
    of: Int[Tensor, " in"] | None = None

    def nearest(self, weight: Float[Tensor, "out in"], first: int = 0) -> UInt8[Tensor, "out in"]:
        """The code of the nearest value of the grid. `first`: which column of the matrix `weight` begins with."""
        scales, zeros = self._spread(weight.shape[1], first)
        return (torch.round(weight / scales) + zeros).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def values(self, codes: UInt8[Tensor, "out in"], first: int = 0) -> Float[Tensor, "out in"]:
        """What the codes stand for."""
        scales, zeros = self._spread(codes.shape[1], first)
        return scales * (codes.to(scales.dtype) - zeros)

    def divided(self, by: Float[Tensor, " out"], stored: torch.dtype = torch.float16) -> Grid:
        """The grid of the rows divided by one positive number each: the same codes stand for them."""
        return dataclasses.replace(self, scales=(self.scales / by[:, None]).clamp(min=_smallest(stored)).to(stored).float())

    def _spread(self, columns: int, first: int) -> tuple[Tensor, Tensor]:
        if self.scales.shape[1] == 1:
            return self.scales, self.zeros
        if self.of is None:
            of = torch.arange(first, first + columns, device=self.scales.device) // self.group
        else:
            of = self.of[first : first + columns]
        return self.scales[:, of], self.zeros[:, of]


def check_width(bits: int) -> None:
    """Raises BadInput: there is no grid of so many bits."""
    if bits not in WIDTHS:
        raise BadInput(f"weights are quantized to {', '.join(map(str, WIDTHS))} bits; got {bits}")


def find_grid(
    weight: Float[Tensor, "out in"],
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = False,
    clip: bool = False,
    stored: torch.dtype = torch.float16,
) -> Grid:
    """The grid that spans every row's, or every group's, smallest and largest number and 0.

    Args:
        group: inputs that share a scale (None: all). symmetric: the code of 0 is in the middle.
        clip: take the range, of `SHRINKS` narrower ones, with the least error (numbers beyond it are cut off).
        stored: the type that scales are kept in; they are rounded to it before anything is rounded to the grid.

    Source: Frantar et al. 2022, "GPTQ" (arXiv 2210.17323), published quantizer.
    """
    check_width(bits)
    group = weight.shape[1] if group is None else group
    # Padding with zeros changes no range, which includes 0, and no error, as 0 is on every grid.
    blocks = F.pad(weight.float(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    low, high = blocks.amin(dim=2).clamp(max=0), blocks.amax(dim=2).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    scales, zeros = _range(low, high, bits, symmetric, stored)
    if clip:
        best = torch.full_like(low, float("inf"))
        tried_scales, tried_zeros = scales, zeros
        for i in range(SHRINKS):
            tried_scales, tried_zeros = _range(low * (1 - i / 100), high * (1 - i / 100), bits, symmetric, stored)
            s, z = tried_scales[..., None], tried_zeros[..., None]
            rounded = s * ((torch.round(blocks / s) + z).clamp(0, 2**bits - 1) - z)
            error = (rounded - blocks).abs().pow(NORM).sum(dim=2)
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, tried_scales, scales), torch.where(better, tried_zeros, zeros)
    return Grid(scales, zeros, bits, group)


def fake_quantize(x: Float[Tensor, "... group"], bits: int | None) -> Float[Tensor, "... group"]:
    """`x` on the grids of its groups (the last dimension), with gradient 1 inside a grid's range and 0 at its ends and beyond; None: `x`.

    Source: Wang et al. 2024, "CSKV", published quantizer, whose grids need not hold 0: a group of one sign was cut off there.
    """
    if bits is None:
        return x
    flat = x.reshape(-1, x.shape[-1])
    with torch.no_grad():
        grid = find_grid(flat, bits)
        values = grid.values(grid.nearest(flat.float())).to(x.dtype)
        inside = (flat > grid.scales * -grid.zeros) & (flat < grid.scales * (2**bits - 1 - grid.zeros))
    return (torch.where(inside, flat, flat.detach()) + (values - flat).detach()).view_as(x)


def _range(low: Tensor, high: Tensor, bits: int, symmetric: bool, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = ((high - low) / (2**bits - 1)).clamp(min=_smallest(stored)).to(stored).float()
    middle = torch.full_like(scales, 2 ** (bits - 1))
    return scales, middle if symmetric else torch.round(-low / scales).clamp(0, 2**bits - 1)


def _smallest(stored: torch.dtype) -> float:
    """The smallest positive scale that is told from zero."""
    return 6e-8 if stored == torch.float16 else torch.finfo(stored).tiny
