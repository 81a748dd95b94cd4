"""Token vectors of one bit a number and one scale a token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.nn.binarize import binary_weight, sign
from layerwise.nn.packing import pack, packed_bytes, unpack


class OneBitTable(nn.Embedding):
    """mean|E_i| sign(E_i - mean E) for token i; the gradient goes to E unchanged. A tied head multiplies by E itself.

    Source: Xing et al. 2024, "BiPFT" (arXiv 2312.08937), whose published code binarizes its word embedding so.
    """

    def forward(self, ids: Int[Tensor, "b s"]) -> Float[Tensor, "b s size"]:
        return F.embedding(ids, binary_weight(self.weight, rows=True))


class PackedTable(nn.Module):
    """A trained `OneBitTable` as it is kept and read: eight numbers to a byte, row by row, and a scale a row. It is frozen."""

    bits: Tensor
    scales: Tensor

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("bits", torch.empty(count, packed_bytes(size, 1), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(count, 1))

    def forward(self, ids: Int[Tensor, "b s"]) -> Float[Tensor, "b s size"]:
        rows, scales = F.embedding(ids, self.bits), F.embedding(ids, self.scales)
        signs = unpack(rows.flatten(), 1, 8 * rows.numel()).view(*ids.shape, -1)[..., : self.size]
        return scales * (signs.to(scales.dtype) * 2 - 1)

    @torch.no_grad()
    def store(self, weight: Float[Tensor, "count size"]) -> None:
        """Become what a `OneBitTable` with this weight is."""
        bits = F.pad(sign(weight - weight.mean()) > 0, (0, -self.size % 8))
        self.bits, self.scales = pack(bits, 1).view(len(weight), -1), weight.abs().mean(dim=1, keepdim=True)
