"""A window of the newest entries in a buffer that is written round and round, counted for each row of a batch on its own.

Token number t of a row (padding is no token) stands at place t % size. A row that is padded is therefore kept exactly as it would be
alone. Which entry goes where is worked out once a pass, on the CPU, and is the same for all layers that are in step.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from layerwise.stack.context import PAD, Context


def real_tokens(ctx: Context, positions: Int[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
    """Which of a pass's positions are no padding, on the CPU; nothing is waited for where there is none."""
    return torch.ones(positions.shape, dtype=torch.bool) if ctx.plain else (positions != PAD).cpu()


def real_first(real: Bool[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """The index of the first, second, ... real token of every row; padding comes last."""
    return torch.argsort((~real).to(torch.uint8), dim=1, stable=True)


def tokens_at(count: Int[Tensor, " b"], size: int, first: int = 0) -> Int[Tensor, "b size"]:
    """The number of the token that stands at every place once `count` tokens were seen, those before `first` left out; -1: none."""
    newest = count[:, None] - first - 1
    number = newest - (newest - torch.arange(size)) % size
    return torch.where(number >= 0, number + first, -1)


def sources(tokens: Int[Tensor, "b size"], before: Int[Tensor, " b"], order: Int[Tensor, "b s"]) -> Int[Tensor, "b size"]:
    """Where each place gets its entry from, as an index into (what stands there, what is new); `tokens`: what shall stand there."""
    size = tokens.shape[1]
    new = order.expand(len(tokens), -1).gather(1, (tokens - before[:, None]).clamp(0, order.shape[1] - 1))
    return torch.where(tokens >= before[:, None], size + new, torch.arange(size))


def take(x: Tensor, index: Int[Tensor, "b n"], dim: int = 1) -> Tensor:
    """The entries `index` of `x` along `dim`, for every row (the first dimension) its own, or for all the same."""
    if index.shape[0] == 1:
        return x.index_select(dim, index[0])
    shape: list[Any] = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    return x.gather(dim, index.view(shape).expand(*(n if i in (0, dim) else x.shape[i] for i, n in enumerate(shape))))


def grown(positions: Tensor, rows: int) -> Tensor:
    """Positions that all rows share, for each of them."""
    return positions if positions.shape[0] == rows else positions.expand(rows, -1)
