"""Thin features in blocks of neighbouring positions: as they are, or packed in a few bits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.nn.integers import Grid, fake_quantize, find_grid
from layerwise.nn.packing import pack, unpack


class Blocks:
    """Growing blocks of `size` positions, (b, blocks, size, channels) in all.

    Args:
        bits: of a number (None: as it is).
        group: channels of a position that share a scale; None: the positions of a block share one, channel by channel.
    """

    def __init__(self, size: int, bits: int | None = None, group: int | None = None) -> None:
        self.size, self.bits, self.group = size, bits, group
        self.channels = 0
        self.dtype = torch.float32
        self.stored: tuple[Tensor, ...] = ()
        """(b, blocks, ...): the features; or bytes of codes and zeros, and half-precision scales."""

    def __len__(self) -> int:
        return self.stored[0].shape[1] if self.stored else 0

    def put(self, new: Float[Tensor, "b n channels"], total: int, targets: tuple[Tensor, Tensor, Tensor]) -> None:
        """Take over blocks of `new` positions: block `targets[2]` of row `targets[0]` becomes its block `targets[1]` of `total`."""
        self.channels, self.dtype = new.shape[2], new.dtype
        made = self._packed(new.unflatten(1, (-1, self.size)))
        rows, places, which = targets
        held = []
        for i, part in enumerate(made):
            room = part.new_zeros(part.shape[0], total, *part.shape[2:])
            if self.stored:
                room[:, : len(self)] = self.stored[i]
            if len(rows) == 0:
                room[:, places] = part[:, which]
            else:
                room[rows, places] = part[rows, which]
            held.append(room)
        self.stored = tuple(held)

    def read(self) -> Float[Tensor, "b n channels"]:
        """All features."""
        if self.bits is None:
            return self.stored[0].flatten(1, 2)
        data, scales = self.stored
        groups = scales.shape[2]
        each = self.size * self.channels // groups
        # Every block's numbers were filled up to a multiple of eight, so that it begins with a byte of its own.
        count = data.shape[2] * 8 // self.bits
        numbers = unpack(data.reshape(-1), self.bits, data.shape[0] * data.shape[1] * count).view(*data.shape[:2], count)
        codes = numbers[..., : groups * each].unflatten(2, (groups, each))
        grid = Grid(
            scales.to(self.dtype)[..., None], numbers[..., groups * each : groups * (each + 1), None].to(self.dtype), self.bits, each
        )
        values = grid.scales * (codes.to(self.dtype) - grid.zeros)
        whole = values.transpose(2, 3) if self.group is None else values.reshape(*data.shape[:2], self.size, self.channels)
        return whole.flatten(1, 2)

    def reorder(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`."""
        self.stored = tuple(t.index_select(0, rows) for t in self.stored)

    def _packed(self, blocks: Float[Tensor, "b blocks size channels"]) -> tuple[Tensor, ...]:
        if self.bits is None:
            return (blocks,)
        groups = grouped(blocks, self.group)
        b, n, count, each = groups.shape
        flat = groups.reshape(-1, each)
        grid = find_grid(flat, self.bits)
        numbers = torch.cat([grid.nearest(flat.float()).reshape(b * n, -1), grid.zeros.to(torch.uint8).reshape(b * n, -1)], dim=1)
        numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % 8))
        return pack(numbers, self.bits).view(b, n, -1), grid.scales.view(b, n, count).half()


def grouped(blocks: Float[Tensor, "... size channels"], group: int | None) -> Float[Tensor, "... groups each"]:
    """The numbers of each block by the scale that they share, see `Blocks`."""
    if group is None:
        return blocks.transpose(-1, -2)
    return blocks.reshape(*blocks.shape[:-2], -1, group)


def ungrouped(groups: Float[Tensor, "... groups each"], shape: torch.Size, group: int | None) -> Float[Tensor, "... size channels"]:
    """The inverse of `grouped`; `shape` of the blocks."""
    return groups.transpose(-1, -2) if group is None else groups.reshape(shape)


def as_stored(thin: Float[Tensor, "b s channels"], size: int, bits: int | None, group: int | None) -> Float[Tensor, "b s channels"]:
    """Features as `Blocks` gives them back, with a gradient (`fake_quantize`); those behind the last whole block as they are."""
    whole = thin.shape[1] // size * size
    if bits is None or not whole:
        return thin
    blocks = thin[:, :whole].unflatten(1, (-1, size))
    rounded = ungrouped(fake_quantize(grouped(blocks, group), bits), blocks.shape, group)
    return torch.cat([rounded.flatten(1, 2), thin[:, whole:]], dim=1)
