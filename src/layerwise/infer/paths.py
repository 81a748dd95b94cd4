"""A pass through a model in parts, and texts continued along paths of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.infer.generate import generate
from layerwise.models.heads import LMHead
from layerwise.models.model import Model
from layerwise.nn.cache import Cache
from layerwise.objectives.early_exit import normed
from layerwise.stack.context import Context


def enter(model: Model, ids: Int[Tensor, "b s"], cache: Cache) -> tuple[Float[Tensor, "b s width"], Context]:
    """Begin a pass over new tokens: what enters layer 0, and the context for `model.stack.part`."""
    positions = torch.arange(cache.length, cache.length + ids.shape[1], device=ids.device)[None]
    ctx = Context(cache=cache)
    x = model.embedding({"input_ids": ids}, positions)
    ctx.begin(x, model.stack.relative)
    return x, ctx


def resume(model: Model, states: Sequence[Float[Tensor, "b _ width"]], cache: Cache) -> tuple[Float[Tensor, "b s width"], Context]:
    """Go on, for the last positions that were entered, from the streams that some layer left: they run in one piece, and nothing twice."""
    x = torch.cat(list(states), dim=1)
    positions = torch.arange(cache.length - x.shape[1], cache.length, device=x.device)[None]
    return x, Context(positions=positions, cache=cache, relative=model.stack.relative, plain=True)


def exit_logits(model: Model, stream: Float[Tensor, "b s width"]) -> Float[Tensor, "b s vocab"]:
    """The scores of the stream after any layer, through the final norm and the head."""
    assert isinstance(model.head, LMHead)
    return model.head(normed(model, stream), model.token_matrix)


def generate_along(model: Model, ids: Int[Tensor, "b s"], paths: Sequence[Sequence[int]], **options: Any) -> Int[Tensor, "b s_new"]:
    """Continue every row along its own path, rows with one path together; see `layerwise.infer.generate`.

    Caches are kept by path: a repeated layer has a slot for each visit.

    Raises:
        BadInput: there is not one path a row.
    """
    if len(paths) != len(ids):
        raise BadInput(f"{len(paths)} paths were given for {len(ids)} prompts: give one for each")
    mask = options.pop("attention_mask", None)
    made: dict[int, Tensor] = {}
    for path in dict.fromkeys(tuple(p) for p in paths):
        rows = [r for r, p in enumerate(paths) if tuple(p) == path]
        kept = None if mask is None else mask[rows]
        made |= dict(zip(rows, generate(model, ids[rows], path=list(path), attention_mask=kept, **options), strict=True))
    # Rows are cut short only where a stop token ended them, so it fills the rest.
    fill = options.get("stop") or 0
    return torch.nn.utils.rnn.pad_sequence([made[r] for r in range(len(ids))], batch_first=True, padding_value=fill)
