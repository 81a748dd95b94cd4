"""NormalFloat: 4-bit codes whose 16 levels are quantiles of a normal distribution, scaled block by block.

Source: Dettmers et al. 2023, "QLoRA", section 3 and appendix E.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.nn.packing import pack, packed_bytes

BLOCK = 64
SECOND_BLOCK = 256
OFFSET = 0.9677083
"""The outermost quantile: the mean of 1 - 1/30 and 1 - 1/32, so that neither tail is infinite."""


@functools.cache
def levels() -> Tensor:
    """The 16 levels in [-1, 1], ascending: 8 above zero, 7 below, zero itself."""
    inverse = torch.distributions.Normal(0.0, 1.0).icdf
    above = inverse(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64))[:-1]
    below = -inverse(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64))[:-1]
    made = torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values
    return (made / made.max()).float()


@functools.cache
def pairs() -> Tensor:
    """(256, 2): the two levels that a byte of codes stands for."""
    byte = torch.arange(256)
    return levels()[torch.stack([byte & 15, byte >> 4], dim=1)]


@dataclass
class NF4:
    """A quantized matrix.

    Attributes:
        codes: two 4-bit codes a byte. scales: the largest magnitude of each block: float32; or, quantized once more, uint8.
        second: the (mean, then scale of every `SECOND_BLOCK` scales) of doubly quantized scales; None: scales are float32.
    """

    codes: Tensor
    scales: Tensor
    second: Tensor | None = None


def sizes(count: int, block: int = BLOCK, double: bool = False) -> tuple[int, int, int]:
    """Lengths of (codes, scales, second) for a matrix of `count` numbers."""
    blocks = -(-count // block)
    return packed_bytes(count, 4), blocks, (1 + -(-blocks // SECOND_BLOCK)) if double else 0


def quantize(weight: Tensor, block: int = BLOCK, double: bool = False) -> NF4:
    """The nearest level for every number, in units of its block's largest magnitude; blocks run along rows, the last may be short.

    Args:
        double: also the scales in 8 bits: less their mean, in units of the largest magnitude of every 256 (QLoRA, section 3).
    """
    table = levels().to(weight.device)
    flat = weight.detach().float().reshape(-1)
    count = flat.numel()
    flat = torch.nn.functional.pad(flat, (0, -count % block)).view(-1, block)
    scales = flat.abs().amax(dim=1)
    second = None
    stored = scales
    if double:
        stored, second = _quantize_scales(scales)
        scales = _scales(NF4(stored, stored, second))
    ratio = flat / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(ratio, (table[1:] + table[:-1]) / 2, out_int32=True)
    return NF4(pack(codes.reshape(-1)[:count], 4), stored, second)


def dequantize(packed: NF4, shape: tuple[int, ...], block: int = BLOCK, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that `quantize` left, of `shape`."""
    count = int(torch.Size(shape).numel())
    values = torch.nn.functional.embedding(packed.codes.int(), pairs().to(packed.codes.device)).view(-1)[:count]
    values = torch.nn.functional.pad(values, (0, -count % block)).view(-1, block) * _scales(packed)[:, None]
    return values.reshape(-1)[:count].view(shape).to(dtype)


def _quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    mean = scales.mean()
    rest = torch.nn.functional.pad(scales - mean, (0, -len(scales) % SECOND_BLOCK)).view(-1, SECOND_BLOCK)
    unit = rest.abs().amax(dim=1) / 127
    codes = (rest / unit.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round() + 128
    return codes.to(torch.uint8).reshape(-1)[: len(scales)], torch.cat([mean[None], unit])


def _scales(packed: NF4) -> Tensor:
    if packed.second is None:
        return packed.scales
    unit = packed.second[1:].repeat_interleave(SECOND_BLOCK)[: len(packed.scales)]
    return (packed.scales.float() - 128) * unit + packed.second[0]
