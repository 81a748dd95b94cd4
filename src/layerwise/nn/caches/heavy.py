"""For every head, the positions that have got most attention, and the newest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.nn.caches.ring import grown
from layerwise.stack.context import PAD, Context
from layerwise.stack.parts_spec import CacheSpec

if TYPE_CHECKING:
    from layerwise.nn.attention import Attention


class HeavyStore:
    """Keys and values of the newest `window` tokens and of the `heavy` others with the largest sums of attention probabilities.

    Sums go over all queries so far and over the query heads of a key head; what was let go does not come back.
    Source: Zhang et al. 2023, "H2O: Heavy-Hitter Oracle" (arXiv 2306.14048), section 4.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.kept: list[Tensor] = []
        """Keys and values, (b, h, n, d)."""
        self.numbers = torch.empty(0)
        """(b, h, n) how many tokens a row had seen before this one; -1 for padding. Padding comes first, then numbers rise."""
        self.sums = torch.empty(0)
        """(b, h, n) attention so far."""
        self.seen = torch.empty(0)
        """(b, 1) tokens that a row has seen."""

    def tensors(self) -> list[Tensor]:
        return self.kept

    def extend(self, attention: Attention, x: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Everything kept and the pass's own keys and values. What is kept is past, so its position is given as 0, or as padding."""
        assert ctx.positions is not None
        rows, heads = k.shape[:2]
        if not self.kept:
            self.kept = [t[:, :, :0] for t in (k, v)]
            self.numbers = torch.empty(rows, heads, 0, dtype=torch.long, device=k.device)
            self.sums = torch.empty(rows, heads, 0, device=k.device)
            self.seen = torch.zeros(rows, 1, dtype=torch.long, device=k.device)
        positions = grown(ctx.positions, rows)
        real = positions != PAD
        number = (self.seen + real.cumsum(dim=1) - 1).masked_fill(~real, -1)
        old = torch.where(self.numbers[:, 0] >= 0, 0, PAD)
        self.seen = self.seen + real.sum(dim=1, keepdim=True)
        self.kept = [torch.cat([kept, new], dim=2) for kept, new in zip(self.kept, (k, v), strict=True)]
        self.numbers = torch.cat([self.numbers, number[:, None].expand(-1, heads, -1)], dim=2)
        return *self.kept, (torch.cat([old, positions], dim=1) if old.shape[1] else ctx.positions)  # type: ignore[return-value]

    def observe(self, probabilities: Float[Tensor, "b heads s keys"], ctx: Context) -> None:
        """Add the attention of a pass and let go of what is too much."""
        assert ctx.positions is not None
        rows, heads, held = self.numbers.shape
        real = grown(ctx.positions, rows) != PAD
        given = (probabilities.float() * real[:, None, :, None]).sum(dim=2).unflatten(1, (heads, -1)).sum(dim=2)
        given[..., : self.sums.shape[2]] += self.sums
        budget = self.spec.window + self.spec.heavy
        newest = self.numbers >= (self.seen - self.spec.window)[:, None]
        worth = given.masked_fill(newest, float("inf")).masked_fill(self.numbers < 0, -1.0)
        kept = worth.topk(min(budget, held), dim=2).indices
        # Padding first, so that the rows' heads have it at the same places; then in order of time.
        kept = kept.gather(2, self.numbers.gather(2, kept).argsort(dim=2))
        self.numbers, self.sums = self.numbers.gather(2, kept), given.gather(2, kept)
        self.kept = [t.gather(2, kept[..., None].expand(-1, -1, -1, t.shape[3])) for t in self.kept]

    def reorder(self, rows: Tensor, same: dict[int, object]) -> None:
        """Keep the batch rows `rows`."""
        self.kept = [t.index_select(0, rows) for t in self.kept]
        self.numbers, self.sums, self.seen = (t.index_select(0, rows) for t in (self.numbers, self.sums, self.seen))
