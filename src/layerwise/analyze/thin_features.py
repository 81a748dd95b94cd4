"""What is lost of keys and values that are made again from thin features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.nn.attention import Attention
from layerwise.nn.caches.blocks import as_stored
from layerwise.nn.linears.shrunk import Shrunk
from layerwise.stack.record import inputs_of


def cache_errors(model: Model, data: Any, *, split: str = "validation", batch: int = 16, batches_at_most: int = 1) -> Findings:
    """How far keys and values made again from a shrunk cache's thin features, rounded as it rounds them, are from the exact ones.

    Metrics: `key_error` and `value_error`, ||K - K^||^2 / ||K||^2 and the same of values, means over layers; `cache_loss`, what the
    objective `cache-reconstruction` makes small, on these rows.
    """
    check_thin(model.spec)
    attentions = shrunk_attentions(model)
    sums = torch.zeros(len(attentions), 2, 2, dtype=torch.float64)
    count = 0.0
    with inference(model):
        for rows in batches(split_of(data, split), batch, batches_at_most, model.device):
            read, real = read_by(model, attentions, rows), real_tokens(rows)
            count += float(real.sum())
            for i, attention in enumerate(attentions):
                for j, (exact, again) in enumerate(made_again(attention, read[i])):
                    sums[i, j] += torch.stack([squared(exact - again, real), squared(exact, real)]).cpu()
    shares = sums[:, :, 0] / sums[:, :, 1]
    key, value = shares.mean(dim=0).tolist()
    lines: list[list[Cell]] = [[i, *line] for i, line in enumerate(shares.tolist())]
    metrics = {"key_error": key, "value_error": value, "cache_loss": float(sums[:, :, 0].sum()) / count}
    return Findings(metrics, tables=[Table("Keys and values lost in thin features", ["layer", "key", "value"], lines)])


def check_thin(spec: ModelSpec, **_: Any) -> None:
    """Raises BadInput: no layer keeps thin features of its keys and values."""
    caches = [getattr(layer, "cache", None) for layer in spec.stack.layers]
    if not any(cache is not None and cache.kind == "low-rank" for cache in caches):
        raise BadInput("no layer of this model keeps thin features of keys and values: make them first (edit: shrink-cache)")


def shrunk_attentions(model: nn.Module) -> list[Any]:
    """The attention of every layer that keeps thin features, first layer first."""
    return [m for m in model.modules() if isinstance(m, Attention) and isinstance(m.k, Shrunk) and not m.cross]


def read_by(model: nn.Module, attentions: list[Any], batch: Mapping[str, Any], **context: Any) -> dict[int, Float[Tensor, "b s width"]]:
    """What each attention reads when the model runs with its own keys and values, without gradients."""
    read: dict[int, Tensor] = {}
    # Keys and values are made from the same input.
    with inference(model), inputs_of({i: attention.k for i, attention in enumerate(attentions)}, read.__setitem__):
        model(batch, **context)
    return read


def made_again(attention: Any, x: Float[Tensor, "b s width"]) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys, and values, as they are and as the cache would give them back: (b, h, s, d) each, keys before rotation and behind their norm."""
    cache = attention.spec.cache
    for linear, norm, group in (
        (attention.k, attention.k_norm, None),
        (attention.v, None, cache.group or attention.v.rank // attention.spec.kv_heads),
    ):
        thin = as_stored(linear.shrink(x), cache.window, cache.bits, group)
        with torch.no_grad():
            exact = attention.heads(linear(x), norm)
        yield exact, attention.heads(linear.widen(thin), norm)


def real_tokens(batch: Mapping[str, Any]) -> Bool[Tensor, "b s"]:
    """Which positions are no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def squared(x: Float[Tensor, "b h s d"], real: Bool[Tensor, "b s"]) -> Float[Tensor, ""]:
    """The sum over real positions of the mean over heads and channels of x^2."""
    return (x.float().square().mean(dim=(1, 3)) * real).sum()
