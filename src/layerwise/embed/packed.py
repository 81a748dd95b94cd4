"""Token vectors as whole numbers on a grid, packed."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.nn.integers import Grid, find_grid
from layerwise.nn.packing import pack, packed_bytes, unpack


class IntegerTable(nn.Module):
    """A frozen table of `bits` bits a number, one scale and one zero for `group` neighbours of a row: what is looked up is unpacked, no more.

    Every row begins with a new byte. Scales have the type of the model's weights, and so have the vectors that come out.
    """

    codes: Tensor
    zeros: Tensor

    def __init__(self, count: int, size: int, bits: int, group: int | None = None) -> None:
        super().__init__()
        self.size, self.bits, self.group = size, bits, size if group is None else group
        self.padded = size + -size % 8
        groups = -(-size // self.group)
        self.register_buffer("codes", torch.empty(count, packed_bytes(self.padded, bits), dtype=torch.uint8))
        self.register_buffer("zeros", torch.empty(count, groups, dtype=torch.uint8))
        self.scales = nn.Parameter(torch.empty(count, groups), requires_grad=False)

    def forward(self, ids: Int[Tensor, ...]) -> Float[Tensor, "... size"]:
        rows, scales, zeros = (F.embedding(ids.flatten(), t) for t in (self.codes, self.scales, self.zeros))
        return self._values(rows, scales, zeros).view(*ids.shape, self.size)

    def matrix(self) -> Float[Tensor, "count size"]:
        """The whole table, unpacked."""
        return self._values(self.codes, self.scales.detach(), self.zeros)

    @torch.no_grad()
    def store(self, weight: Float[Tensor, "count size"]) -> None:
        """Round a table to the nearest numbers."""
        grid = find_grid(weight, self.bits, self.group, stored=weight.dtype)
        self.codes = pack(F.pad(grid.nearest(weight.float()), (0, self.padded - self.size)), self.bits).view(len(weight), -1)
        self.zeros = grid.zeros.to(torch.uint8)
        self.scales = nn.Parameter(grid.scales.to(weight.dtype), requires_grad=False)

    def _values(self, rows: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        codes = unpack(rows.flatten(), self.bits, len(rows) * self.padded).view(len(rows), self.padded)[:, : self.size]
        return Grid(scales.float(), zeros.float(), self.bits, self.group).values(codes).to(scales.dtype)
