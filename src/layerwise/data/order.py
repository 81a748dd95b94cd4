"""Which rows a step sees: a pure function of the seed and the step, so a resumed run needs no state for it."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from layerwise.errors import BadInput


class Order:
    """Every epoch is a fresh permutation, epochs follow each other without dropping a row.

    Args:
        rows: rows of the split. batch: rows of one step. seed: of the permutations.
    """

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        if rows < 1 or batch < 1:
            raise BadInput(f"an order needs at least one row and a batch of at least one; got {rows} rows, batch {batch}")
        self.rows, self.batch, self.seed = rows, batch, seed
        self._kept: dict[int, Tensor] = {}

    def indices(self, step: int) -> Int[Tensor, " batch"]:
        """The rows of step number `step`; a batch may reach into the next epoch, and into several when it is large."""
        parts = []
        at, end = step * self.batch, (step + 1) * self.batch
        while at < end:
            epoch, offset = divmod(at, self.rows)
            part = self._permutation(epoch)[offset : offset + end - at]
            parts.append(part)
            at += len(part)
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._kept:
            while len(self._kept) > 1:
                self._kept.pop(min(self._kept))
            seed = (self.seed * 1_000_003 + epoch * 7_919 + 1) & 0x7FFF_FFFF_FFFF
            self._kept[epoch] = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))
        return self._kept[epoch]
