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
