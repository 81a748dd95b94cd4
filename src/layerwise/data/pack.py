"""Tokens in rows of one length."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def packed(documents: Iterable[np.ndarray], length: int, eos: int | None, vocab: int) -> np.ndarray:
    """Documents one after another, an end token after each, cut into rows: (rows, length). The last part row is dropped."""
    small = np.uint16 if vocab <= 1 << 16 else np.uint32
    end = np.array([] if eos is None else [eos], dtype=small)
    parts = [part for document in documents for part in (document.astype(small), end)]
    flat = np.concatenate(parts) if parts else np.empty(0, dtype=small)
    rows = len(flat) // length
    return flat[: rows * length].reshape(rows, length)


def padded(
    documents: Iterable[np.ndarray], length: int, pad: int, cls: int | None, sep: int | None, vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    """One document a row, cut or padded on the right, between cls and sep where there are: ids and lengths."""
    small = np.uint16 if vocab <= 1 << 16 else np.uint32
    before, after = ([] if i is None else [i] for i in (cls, sep))
    room = length - len(before) - len(after)
    rows, lengths = [], []
    for document in documents:
        row = np.full(length, pad, dtype=small)
        kept = np.concatenate([before, document[:room], after]).astype(small)
        row[: len(kept)] = kept
        rows.append(row)
        lengths.append(len(kept))
    return np.stack(rows) if rows else np.empty((0, length), dtype=small), np.array(lengths, dtype=np.int64)


def paired(
    prompts: Iterable[np.ndarray], targets: Iterable[np.ndarray], length: int, pad: int, sep: int, eos: int, vocab: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Prompt, sep, target, eos and padding on the right, one pair a row: ids, where the target begins, lengths, and which pairs were short enough."""
    small = np.uint16 if vocab <= 1 << 16 else np.uint32
    rows, starts, lengths, kept = [], [], [], []
    for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        whole = np.concatenate([prompt, [sep], target, [eos]]).astype(small)
        if len(whole) > length:
            continue
        rows.append(np.pad(whole, (0, length - len(whole)), constant_values=pad))
        starts.append(len(prompt) + 1)
        lengths.append(len(whole))
        kept.append(i)
    made = np.stack(rows) if rows else np.empty((0, length), dtype=small)
    return made, np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64), np.array(kept, dtype=np.int64)
