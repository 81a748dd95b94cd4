"""Thin features of old keys and values, and the newest ones in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.nn.caches.blocks import Blocks
from layerwise.nn.caches.ring import grown, real_first, real_tokens, sources, take, tokens_at
from layerwise.nn.positions import rotate
from layerwise.stack.context import PAD, Context
from layerwise.stack.parts_spec import CacheSpec

if TYPE_CHECKING:
    from layerwise.nn.attention import Attention


@dataclass(frozen=True)
class Layout:
    """What is where, in all slots that are in step. Rows of a batch differ where they are padded; else there is one for all.

    Of a row's tokens the first `blocks` x window are in blocks. Those behind them have their thin features in a ring of `thin` places and
    the newest ones are whole in a ring of `window` places.

    Attributes:
        counts: (b,) tokens seen, on the CPU. blocks: (b,) whole blocks, on the CPU.
        in_blocks, in_thin, in_full: (b, n) positions of what stands there; `PAD` where nothing does, or nothing that is read from there.
        thin, full: the places of the rings that some row reads.
        positions: of all that is read: blocks, thin ring, full ring. old: of the first two, which are made again from thin features.
    """

    counts: Tensor
    blocks: Tensor
    in_blocks: Tensor
    in_thin: Tensor
    in_full: Tensor
    thin: slice
    full: slice
    positions: Tensor
    old: Tensor


@dataclass(frozen=True)
class Plan:
    """One pass: what it reads, and where what it brings goes.

    Attributes:
        before, after: layouts. positions: of the pass. keys: positions of all keys of the pass, old ones first.
        thin, full: (b, size) sources of the rings' places. flush: (b, n) sources of new blocks in (thin ring, new tokens), None: no new block.
        targets: rows, places and numbers of these blocks.
    """

    before: Layout
    after: Layout
    positions: Tensor
    keys: Tensor
    thin: Tensor
    full: Tensor
    flush: Tensor | None
    targets: tuple[Tensor, Tensor, Tensor]


class ThinStore:
    """Keys before rotation and values as thin features A x, from which B makes them again at their positions; the newest ones in full.

    Source: Wang et al. 2024, "CSKV", section 3.2 (arXiv 2409.10593), and the published code.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        # Sliding, a block leaves the window token by token, and waits in thin features until all of it has.
        self.places = 2 * spec.window if spec.sliding else spec.window
        self.layout: Layout | None = None
        self.key_blocks, self.value_blocks = Blocks(spec.window, spec.bits), Blocks(spec.window, spec.bits)
        self.thin: list[Tensor] = []
        """Thin features of keys and of values in their ring, (b, places, rank)."""
        self.full: list[Tensor] = []
        """Keys as they are attended to, and values, (b, h, window, d)."""

    def tensors(self) -> list[Tensor]:
        return [*self.key_blocks.stored, *self.value_blocks.stored, *self.thin, *self.full]

    def extend(self, attention: Attention, x: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """The keys and values that a pass attends to: old ones from what is kept, the pass's own as they are; and their positions."""
        maps: Any = attention
        new = [maps.k.shrink(x), maps.v.shrink(x)]
        if self.layout is None:
            self._begin(new, k, v, ctx)
        plan = self._plan(ctx)
        keys, values = self._read(attention, plan.before, k, v, ctx)
        self._write(plan, new, k, v)
        return keys, values, plan.keys

    def reorder(self, rows: Tensor, same: dict[int, object]) -> None:
        """Keep the batch rows `rows`."""
        self.thin, self.full = ([t.index_select(0, rows) for t in ts] for ts in (self.thin, self.full))
        for blocks in (self.key_blocks, self.value_blocks):
            blocks.reorder(rows)
        if self.layout is not None:
            self.layout = same.setdefault(id(self.layout), _of_rows(self.layout, rows))  # type: ignore[assignment]

    def _begin(self, new: list[Tensor], k: Tensor, v: Tensor, ctx: Context) -> None:
        spec = self.spec
        rank = new[1].shape[2]
        self.value_blocks.group = None if spec.bits is None else spec.group or rank // v.shape[1]
        self.thin = [t.new_zeros(t.shape[0], self.places, t.shape[2]) for t in new]
        self.full = [t.new_zeros(*t.shape[:2], spec.window, t.shape[3]) for t in (k, v)]
        assert ctx.cache is not None
        none = torch.zeros(1, dtype=torch.long)
        # One object for all layers, so that they are in step.
        self.layout = ctx.cache.planned(("empty", spec.window, spec.sliding), lambda: _layout(none, none, self, *_empty(self, k.device)))

    def _plan(self, ctx: Context) -> Plan:
        """The plan of this pass; slots in step share it."""
        assert ctx.cache is not None and self.layout is not None
        before = self.layout
        return ctx.cache.planned((id(before), id(ctx.positions), self.places), lambda: _plan(self, before, ctx))

    def _read(self, attention: Attention, layout: Layout, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        maps: Any = attention
        keys, values = [], []
        thin = [[t[:, layout.thin]] if layout.thin.stop > layout.thin.start else [] for t in self.thin]
        if len(self.key_blocks):
            thin = [[blocks.read(), *rest] for blocks, rest in zip((self.key_blocks, self.value_blocks), thin, strict=True)]
        if thin[0]:
            key = attention.heads(maps.k.widen(torch.cat(thin[0], dim=1)), attention.k_norm)
            if attention.spec.position == "rotary":
                key = rotate(key, *attention.rotary(ctx, key.dtype, layout.old))
            keys.append(key)
            values.append(attention.heads(maps.v.widen(torch.cat(thin[1], dim=1))))
        if layout.full.stop > layout.full.start:
            keys.append(self.full[0][:, :, layout.full])
            values.append(self.full[1][:, :, layout.full])
        if not keys:
            return k, v
        return torch.cat([*keys, k], dim=2), torch.cat([*values, v], dim=2)

    def _write(self, plan: Plan, new: list[Tensor], k: Tensor, v: Tensor) -> None:
        both = [torch.cat([ring, fresh], dim=1) for ring, fresh in zip(self.thin, new, strict=True)]
        if plan.flush is not None:
            total = int(plan.after.blocks.max())
            for blocks, thin in zip((self.key_blocks, self.value_blocks), both, strict=True):
                blocks.put(take(thin, plan.flush), total, plan.targets)
        self.thin = [take(thin, plan.thin) for thin in both]
        self.full = [take(torch.cat([ring, fresh], dim=2), plan.full, 2) for ring, fresh in zip(self.full, (k, v), strict=True)]
        self.layout = plan.after


def _empty(store: ThinStore, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of nothing: in no block, and in the places of both rings."""
    return tuple(torch.full((1, n), PAD, device=device) for n in (0, store.places, store.spec.window))  # type: ignore[return-value]


def _plan(store: ThinStore, before: Layout, ctx: Context) -> Plan:
    assert ctx.positions is not None
    window, device = store.spec.window, ctx.positions.device
    real = real_tokens(ctx, ctx.positions)
    rows = max(len(before.counts), len(real))
    order = real_first(real)
    counts = before.counts + real.sum(dim=1)
    seen = before.counts.expand(rows)
    waiting = counts - before.blocks * window
    kept = window if store.spec.sliding else 0
    more = ((waiting - kept) // window).clamp(min=0)
    positions = grown(ctx.positions, rows)

    def moved(ring: Tensor, index: Tensor) -> Tensor:
        return take(torch.cat([grown(ring, rows), positions], dim=1), index)

    flush, targets, in_blocks = None, (torch.empty(0), torch.empty(0), torch.empty(0)), grown(before.in_blocks, rows)
    blocks = before.blocks + more
    if int(more.max()):
        tokens = before.blocks[:, None] * window + torch.arange(int(more.max()) * window)
        # What is no ring place any more comes from the ring while it is old, else from the new tokens.
        fresh = order.expand(rows, -1).gather(1, (tokens - seen[:, None]).clamp(0, order.shape[1] - 1))
        flush = torch.where(tokens < seen[:, None], tokens % store.places, store.places + fresh).to(device)
        targets, in_blocks = _targets(before, more, blocks, moved(before.in_thin, flush), in_blocks, window)
    thin = sources(tokens_at(counts, store.places), seen, order).to(device)
    full = sources(tokens_at(counts, window), seen, order).to(device)
    after = _layout(counts, blocks, store, in_blocks, moved(before.in_thin, thin), moved(before.in_full, full))
    keys = torch.cat([grown(before.positions, rows), positions], dim=1) if before.positions.shape[1] else ctx.positions
    return Plan(before, after, ctx.positions, keys, thin, full, flush, targets)


def _targets(
    before: Layout, more: Tensor, blocks: Tensor, flushed: Tensor, old: Tensor, window: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Where new blocks go, and the positions in all blocks. No rows: all go to the same places, block by block."""
    device, total = flushed.device, int(blocks.max())
    places = torch.full((len(flushed), total, window), PAD, device=device, dtype=flushed.dtype)
    places[:, : old.shape[1] // window] = old.unflatten(1, (-1, window))
    which = torch.arange(int(more.max())).expand(len(more), -1)
    there = (which < more[:, None]).nonzero()
    rows, number = there[:, 0], there[:, 1]
    target = before.blocks.expand(len(more))[rows] + number
    places[rows.to(device), target.to(device)] = flushed.unflatten(1, (-1, window))[rows.to(device), number.to(device)]
    if len(more) == 1:
        rows = rows[:0]
    return (rows.to(device), target.to(device), number.to(device)), places.flatten(1)


def _layout(counts: Tensor, blocks: Tensor, store: ThinStore, in_blocks: Tensor, in_thin: Tensor, in_full: Tensor) -> Layout:
    """The layout of rows that have seen `counts` tokens, what is not read from a ring marked."""
    window = store.spec.window
    full_from = (counts - window).clamp(min=0) if store.spec.sliding else blocks * window
    thin_tokens, full_tokens = tokens_at(counts, store.places), tokens_at(counts, window)
    read_thin = (thin_tokens >= (blocks * window)[:, None]) & (thin_tokens < full_from[:, None])
    read_full = full_tokens >= full_from[:, None]
    thin, full = _span(read_thin), _span(read_full)
    shown = [
        held[:, span].masked_fill(~read[:, span].to(held.device), PAD)
        for held, read, span in ((in_thin, read_thin, thin), (in_full, read_full, full))
    ]
    positions = torch.cat([in_blocks, *shown], dim=1)
    old = positions[:, : in_blocks.shape[1] + thin.stop - thin.start]
    return Layout(counts, blocks, in_blocks, in_thin, in_full, thin, full, positions, old)


def _span(read: Tensor) -> slice:
    """The places that some row reads: one run, since a block begins at the ring's first place or in its middle."""
    there = read.any(dim=0).nonzero()
    return slice(int(there.min()), int(there.max()) + 1) if len(there) else slice(0, 0)


def _of_rows(layout: Layout, rows: Tensor) -> Layout:
    if len(layout.counts) == 1:
        return layout
    here = rows.cpu()
    positions = (layout.in_blocks, layout.in_thin, layout.in_full, layout.positions)
    blocks, thin, full, shown = (t.index_select(0, rows) for t in positions)
    old = shown[:, : layout.old.shape[1]]
    return Layout(layout.counts[here], layout.blocks[here], blocks, thin, full, layout.thin, layout.full, shown, old)
