"""The first positions and the newest, and nothing between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.nn.caches.ring import grown, real_first, real_tokens, sources, take, tokens_at
from layerwise.stack.context import PAD, Context
from layerwise.stack.parts_spec import CacheSpec

if TYPE_CHECKING:
    from layerwise.nn.attention import Attention


@dataclass(frozen=True)
class Plan:
    """One pass: tokens seen before and after (on the CPU), sources of the places, positions of what is kept then, of the pass and of all its keys."""

    before: Layout
    after: Layout
    sources: Tensor
    positions: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Layout:
    """(b,) tokens that every row has seen, on the CPU; and the positions that stand in the places there are, `PAD` in empty ones."""

    counts: Tensor
    positions: Tensor


class RecentStore:
    """Keys and values of the first `sinks` and the newest `window` tokens; they keep their positions.

    Source: Xiao et al. 2023, "StreamingLLM" (arXiv 2309.17453), section 3.2, where positions are counted within the cache. That matters
    for texts longer than those the model was trained on.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.layout: Layout | None = None
        self.kept: list[Tensor] = []
        """Keys and values, (b, h, sinks + window, d)."""

    def tensors(self) -> list[Tensor]:
        return self.kept

    def extend(self, attention: Attention, x: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Everything kept and the pass's own keys and values, and their positions."""
        assert ctx.cache is not None
        if self.layout is None:
            size = self.spec.sinks + self.spec.window
            self.kept = [t.new_zeros(*t.shape[:2], size, t.shape[3]) for t in (k, v)]
            nothing = torch.full((1, 0), PAD, device=k.device)
            self.layout = ctx.cache.planned(("empty", self.spec), lambda: Layout(torch.zeros(1, dtype=torch.long), nothing))
        before = self.layout
        plan = ctx.cache.planned((id(before), id(ctx.positions), self.spec), lambda: _plan(self.spec, before, ctx))
        there = before.positions.shape[1]
        keys, values = (torch.cat([old[:, :, :there], new], dim=2) for old, new in zip(self.kept, (k, v), strict=True))
        self.kept = [take(torch.cat([old, new], dim=2), plan.sources, 2) for old, new in zip(self.kept, (k, v), strict=True)]
        self.layout = plan.after
        return keys, values, plan.keys

    def reorder(self, rows: Tensor, same: dict[int, object]) -> None:
        """Keep the batch rows `rows`."""
        self.kept = [t.index_select(0, rows) for t in self.kept]
        if self.layout is not None and len(self.layout.counts) > 1:
            made = Layout(self.layout.counts[rows.cpu()], self.layout.positions.index_select(0, rows))
            self.layout = same.setdefault(id(self.layout), made)  # type: ignore[assignment]


def _plan(spec: CacheSpec, before: Layout, ctx: Context) -> Plan:
    assert ctx.positions is not None
    device = ctx.positions.device
    real = real_tokens(ctx, ctx.positions)
    rows = max(len(before.counts), len(real))
    order = real_first(real)
    counts = before.counts + real.sum(dim=1)
    # The first tokens stand in the first places for ever, the newest ones go round in the others.
    first = torch.arange(spec.sinks).expand(rows, -1)
    tokens = torch.cat([torch.where(first < counts[:, None], first, -1), tokens_at(counts, spec.window, spec.sinks)], dim=1)
    origin = sources(tokens, before.counts.expand(rows), order).to(device)
    places = tokens.shape[1]
    held = torch.full((rows, places), PAD, device=device)
    held[:, : before.positions.shape[1]] = grown(before.positions, rows)
    positions = grown(ctx.positions, rows)
    all_positions = take(torch.cat([held, positions], dim=1), origin).masked_fill((tokens < 0).to(device), PAD)
    filled = int((tokens >= 0).any(dim=0).sum())
    keys = torch.cat([grown(before.positions, rows), positions], dim=1) if before.positions.shape[1] else ctx.positions
    return Plan(before, Layout(counts, all_positions[:, :filled]), origin, ctx.positions, keys)
