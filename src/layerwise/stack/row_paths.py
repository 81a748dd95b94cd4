"""One batch, and for every row of it a path of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.nn.cache import Slot
from layerwise.stack.context import Context


def run_row_paths(
    call: Callable[[Slot, Tensor, Context], Tensor], x: Float[Tensor, "b s width"], ctx: Context, paths: Sequence[Sequence[int]]
) -> Float[Tensor, "b s width"]:
    """Take row r of `x` along `paths[r]`; rows that wait for the same layer run through it together.

    The lowest layer that any row waits for goes first: rows that skipped ahead wait for those that loop, so paths that differ by
    a few skips and loops need few more calls than the longest of them has layers.

    Args:
        call: `(slot, x, ctx) -> x`, one layer.

    Raises:
        BadInput: there is not one path a row, or a cache, whose slots hold whole batches.
    """
    if len(paths) != x.shape[0]:
        raise BadInput(f"{len(paths)} paths were given for {x.shape[0]} rows: give one path, or one for each row")
    if ctx.cache is not None:
        raise BadInput("rows with paths of their own share no cache: see layerwise.infer.paths.generate_along")
    at = [0] * len(paths)
    while waiting := [path[at[r]] for r, path in enumerate(paths) if at[r] < len(path)]:
        layer = min(waiting)
        rows = [r for r, path in enumerate(paths) if at[r] < len(path) and path[at[r]] == layer]
        for r in rows:
            at[r] += 1
        if len(rows) == len(paths):
            x = call((layer, 0), x, ctx)
        else:
            index = torch.tensor(rows, device=x.device)
            x = x.index_copy(0, index, call((layer, 0), x[index], ctx.rows(index)))
    return x
