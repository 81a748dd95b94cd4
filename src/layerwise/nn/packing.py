"""Small whole numbers packed into bytes: 1, 2, 3, 4 or 8 bits each, without gaps."""

from __future__ import annotations

import torch
from torch import Tensor

from layerwise.errors import BadInput

BITS = (1, 2, 3, 4, 8)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` numbers of `bits` bits take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Numbers 0 .. 2^bits - 1 of any shape as one run of bytes, lowest bits first: uint8, (ceil(numel * bits / 8),).

    Raises:
        BadInput: `bits` is none of 1, 2, 3, 4, 8.
    """
    _check(bits)
    flat = codes.reshape(-1).to(torch.uint8)
    if bits == 8:
        return flat.clone()
    if bits == 3:  # the one width that straddles bytes: through single bits
        flat, bits = ((flat[:, None] >> torch.arange(3, dtype=torch.uint8, device=flat.device)) & 1).reshape(-1), 1
    each = 8 // bits
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % each)).view(-1, each)
    made = flat[:, 0].clone()
    for i in range(1, each):
        made |= flat[:, i] << (i * bits)
    return made


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers in `data`, what `pack` was given: uint8, (count,)."""
    _check(bits)
    if bits == 8:
        return data[:count]
    width = 1 if bits == 3 else bits
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
    flat = ((data[:, None] >> shifts) & (2**width - 1)).reshape(-1)
    if bits != 3:
        return flat[:count]
    parts = flat[: 3 * count].view(count, 3)
    return parts[:, 0] | parts[:, 1] << 1 | parts[:, 2] << 2


def _check(bits: int) -> None:
    if bits not in BITS:
        raise BadInput(f"numbers are packed in 1, 2, 3, 4 or 8 bits; got {bits}")
