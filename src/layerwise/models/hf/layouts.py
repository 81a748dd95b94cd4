"""How tensors of ours make up one tensor of a Hugging Face checkpoint. Every layout is exact in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A pair of inverse functions.

    Attributes:
        pack: (our tensors, number of heads) -> their tensor.
        unpack: (their tensor, rows of each of ours, number of heads) -> our tensors.
    """

    pack: Callable[[list[Tensor], int], Tensor]
    unpack: Callable[[Tensor, list[int], int], list[Tensor]]


def _join(parts: list[Tensor], heads: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _split(whole: Tensor, rows: list[int], heads: int) -> list[Tensor]:
    return [whole] if len(rows) == 1 else [part.clone() for part in whole.split(rows)]


def _join_turned(parts: list[Tensor], heads: int) -> Tensor:
    return _join(parts, heads).T.contiguous() if parts[0].dim() == 2 else _join(parts, heads)


def _split_turned(whole: Tensor, rows: list[int], heads: int) -> list[Tensor]:
    return _split(whole.T.contiguous() if whole.dim() == 2 else whole, rows, heads)


def _interleave(parts: list[Tensor], heads: int) -> Tensor:
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)


def _separate(whole: Tensor, rows: list[int], heads: int) -> list[Tensor]:
    return [part.flatten(0, 1).clone() for part in whole.unflatten(0, (heads, len(rows), -1)).unbind(1)]


JOINED = Layout(_join, _split)
"""One after the other along the first axis; a single tensor as it is."""

TURNED = Layout(_join_turned, _split_turned)
"""As `JOINED`, but matrices are stored (in, out): GPT-2's Conv1D."""

BY_HEAD = Layout(_interleave, _separate)
"""Query, key and value of head 0, then those of head 1, ...: GPT-NeoX."""

ROW = Layout(lambda parts, heads: parts[0][None], lambda whole, rows, heads: [whole[0]])
"""One axis of size 1 in front: BART's bias on the scores, position tables of images."""

CORNER = Layout(lambda parts, heads: parts[0][None, None], lambda whole, rows, heads: [whole[0, 0]])
"""A vector with two axes of size 1 in front: class tokens."""
