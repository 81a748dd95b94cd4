"""Keys and values of earlier positions, for decoding a few positions at a time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.errors import BadInput

Slot = tuple[int, int]
"""`(layer index, how often that layer ran before in this pass)`: one place on the path that is run."""


class Store(Protocol):
    """What a layer that does not keep all keys and values (`LayerSpec.cache`) keeps instead, in one slot."""

    def tensors(self) -> list[Tensor]:
        """The keys and values that are kept, in whatever form; without what keeps books of them."""

    def reorder(self, rows: Int[Tensor, " b"], same: dict[int, object]) -> None:
        """Keep the batch rows `rows`; `same` remembers by id what slots share."""


Kept = TypeVar("Kept", bound=Store)
Made = TypeVar("Made")


class Cache:
    """Growing key/value buffers, one pair a slot.

    A layer that a path repeats has a slot for each visit, and a pass over fewer layers shares the slots it does run.
    A slot may hold fewer entries than another (a layer that was skipped for some positions); every entry remembers its
    position and when it was written, so masks and `crop` stay right.

    A slot of a layer that some rows of the batch skip holds the other rows only (`decisions`).

    Buffers double when they are full, so appending costs amortized constant time. Keys and values are (b, h, length, d).

    Attributes:
        length: positions seen. first: those of the first pass, the prompt.
        decisions: for slots of layers that sequences may skip, the rows of the batch that run them, rising; None: all.
    """

    def __init__(self) -> None:
        self.length = 0
        self.first = 0
        self.decisions: dict[Slot, Tensor | None] = {}
        self._buffers: dict[Slot, tuple[Tensor, Tensor]] = {}
        self._positions: dict[Slot, Tensor] = {}
        self._times: dict[Slot, list[int]] = {}
        self._memory: dict[Slot, tuple[Tensor, Tensor]] = {}
        self._stores: dict[Slot, Store] = {}
        self._plans: dict[tuple[object, ...], object] = {}
        self._joined: tuple[Tensor | None, Tensor, Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all buffers, spare room included."""
        pairs = [*self._buffers.values(), *self._memory.values()]
        stored = [t for store in self._stores.values() for t in store.tensors()]
        return sum(t.numel() * t.element_size() for t in [*stored, *(t for pair in pairs for t in pair)])

    def kept(self) -> list[Tensor]:
        """All that is kept of keys and values, in whatever form, without spare room."""
        pairs = [(k[:, :, : self.held(slot)], v[:, :, : self.held(slot)]) for slot, (k, v) in self._buffers.items()]
        whole = [t for pair in [*pairs, *self._memory.values()] for t in pair]
        return whole + [t for store in self._stores.values() for t in store.tensors()]

    def held(self, slot: Slot) -> int:
        """Number of positions held in `slot`."""
        return len(self._times.get(slot, ()))

    def advance(self, steps: int) -> None:
        """Announce that a pass over `steps` new positions begins."""
        self.first = self.first or steps
        self.length += steps
        self._plans = {}

    def append(
        self, slot: Slot, key: Float[Tensor, "b h s d"], value: Float[Tensor, "b h s d"], positions: Int[Tensor, "b s"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Store new keys and values behind the old ones; return all keys, values and positions of the slot."""
        times = self._times.setdefault(slot, [])
        old, new = len(times), len(times) + key.shape[2]
        pair = self._buffers.get(slot)
        if pair is None or pair[0].shape[2] < new:
            room = max(new, 64) if pair is None else max(new, 2 * pair[0].shape[2])
            grown = (key.new_empty(*key.shape[:2], room, key.shape[3]), value.new_empty(*value.shape[:2], room, value.shape[3]))
            if pair is not None:
                for source, target in zip(pair, grown, strict=True):
                    target[:, :, :old] = source[:, :, :old]
            pair = self._buffers[slot] = grown
        pair[0][:, :, old:new] = key
        pair[1][:, :, old:new] = value
        times.extend(range(self.length - key.shape[2], self.length))
        self._positions[slot] = self._join(self._positions.get(slot), positions)
        return pair[0][:, :, :new], pair[1][:, :, :new], self._positions[slot]

    def _join(self, old: Tensor | None, new: Tensor) -> Tensor:
        """`old` and `new` concatenated; slots in step share one result, so masks made from it are made once a pass."""
        if self._joined is not None and self._joined[0] is old and self._joined[1] is new:
            return self._joined[2]
        if old is None:
            result = new
        else:
            rows = max(old.shape[0], new.shape[0])
            result = torch.cat([old.expand(rows, -1), new.expand(rows, -1)], dim=1)
        self._joined = (old, new, result)
        return result

    def store(self, slot: Slot, make: Callable[[], Kept]) -> Kept:
        """What keeps the keys and values of a slot whose layer does not keep all of them; `make()` where it is not there yet."""
        found = self._stores.get(slot)
        if found is None:
            found = self._stores[slot] = make()
        return found  # type: ignore[return-value]

    def planned(self, key: tuple[object, ...], make: Callable[[], Made]) -> Made:
        """`make()`, kept for the rest of this pass: stores that are in step do the same. What `key` names by id must live in what is made."""
        if key not in self._plans:
            self._plans[key] = make()
        return self._plans[key]  # type: ignore[return-value]

    def remember(self, slot: Slot, key: Tensor, value: Tensor) -> None:
        """Keep the keys and values a cross-attention made from its memory."""
        self._memory[slot] = (key, value)

    def recall(self, slot: Slot) -> tuple[Tensor, Tensor] | None:
        """What `remember` kept, or None."""
        return self._memory.get(slot)

    def crop(self, length: int) -> None:
        """Forget everything written at or after position `length` of the pass (rejected drafts).

        Raises:
            BadInput: a layer's cache has let go of what would have to come back.
        """
        if self._stores and length < self.length:
            raise BadInput("a model whose layers keep a compressed cache takes no step back: no drafts are rejected with it")
        self.length = min(self.length, length)
        short: dict[tuple[int, int], Tensor] = {}
        for slot, times in self._times.items():
            del times[bisect_left(times, length) :]
            old = self._positions[slot]
            self._positions[slot] = short.setdefault((id(old), len(times)), old[:, : len(times)])
        self._joined = None
        if not self.length:  # the next prompt may be of other rows
            self.first = 0
            for store in (self.decisions, self._buffers, self._positions, self._times):
                store.clear()  # type: ignore[attr-defined]

    def keep(self, slot: Slot, rows: Int[Tensor, " k"]) -> None:
        """Keep in one slot only what belongs to the rows `rows`."""
        if not len(rows):
            for store in (self._buffers, self._positions, self._times):
                store.pop(slot, None)  # type: ignore[attr-defined]
        elif slot in self._buffers:
            key, value = self._buffers[slot]
            self._buffers[slot] = key.index_select(0, rows), value.index_select(0, rows)
            if self._positions[slot].shape[0] > 1:
                self._positions[slot] = self._positions[slot].index_select(0, rows)
        self._joined = None

    def reorder(self, rows: Int[Tensor, " b"]) -> None:
        """Keep the batch rows `rows`, in that order (beams, finished sequences)."""
        within: dict[Slot, Tensor] = {}
        for slot, held in self.decisions.items():
            if held is not None:
                place = torch.searchsorted(held, rows).clamp(max=max(len(held) - 1, 0))
                runs = held[place] == rows if len(held) else torch.zeros_like(rows, dtype=torch.bool)
                within[slot] = place[runs]
                self.decisions[slot] = runs.nonzero().squeeze(1)
        for kept in (self._buffers, self._memory):
            kept.update({s: (k.index_select(0, r), v.index_select(0, r)) for s, (k, v) in kept.items() for r in (within.get(s, rows),)})
        shared: dict[Slot | None, dict[int, object]] = {}
        for slot, store in self._stores.items():
            store.reorder(within.get(slot, rows), shared.setdefault(slot if slot in within else None, {}))
        self._plans = {}
        same: dict[tuple[int, int | None], Tensor] = {}
        for slot, positions in self._positions.items():
            if positions.shape[0] > 1:
                key = (id(positions), slot[0] if slot in within else None)
                self._positions[slot] = same.setdefault(key, positions.index_select(0, within.get(slot, rows)))
        self._joined = None
