"""Walking a split in order, without gradients, on the model's device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients inside the block; as it was after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def split_of(data: Any, split: str) -> Any:
    """`data`'s split of that name.

    Raises:
        BadInput: there is none.
    """
    chosen = getattr(data, split, None) if split in ("train", "validation", "test") else None
    if chosen is None:
        have = [s for s in ("train", "validation", "test") if getattr(data, s, None) is not None]
        raise BadInput(f"the data has no split '{split}'; it has {', '.join(have)}")
    return chosen


def batches(split: Any, batch: int, limit: int | None = None, device: torch.device | str = "cpu") -> Iterator[dict[str, Tensor]]:
    """The rows of a split in order, `batch` at a time, at most `limit` batches (evenly spread over the split)."""
    starts = list(range(0, len(split), batch))
    if limit is not None and limit < len(starts):
        starts = [starts[i * len(starts) // limit] for i in range(limit)]
    for start in starts:
        rows = torch.arange(start, min(start + batch, len(split)))
        yield {name: value.to(device) for name, value in split.batch(rows).items()}
