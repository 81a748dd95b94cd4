"""Thin features that keys and values can be made from again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.analyze.findings import Findings, Table
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference
from layerwise.models.spec import ModelSpec
from layerwise.nn.attention import Attention
from layerwise.nn.caches.blocks import as_stored
from layerwise.nn.linears.shrunk import Shrunk
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective
from layerwise.stack.record import inputs_of

NONE_SHRUNK = "cache-reconstruction trains the factors of a shrunk cache: make them first (edit: shrink-cache)"


class CacheReconstruction(Objective):
    """sum over layers of [ mean (K - K^)^2 + mean (V - V^)^2 ], K^ = (X A_K) B_K and V^ = (X A_V) B_V; only these factors are trained.

    X is what the layer reads in the frozen network, whose own keys and values go on, so the layers do not depend on one another.
    Rotation keeps lengths, so keys are compared before it; behind their norm, where they have one. Where the model's cache has `bits`,
    X A is rounded in the cache's own groups, with straight-through gradients (quantization-aware training).

    Source: Wang et al. 2024, "CSKV", equations 3-5 (arXiv 2409.10593), and the published code.
    """

    def __init__(self, data: Any = None) -> None:
        super().__init__()
        self.trained: list[tuple[nn.Parameter, bool]] = []

    @staticmethod
    def check(spec: ModelSpec) -> None:
        """Raises BadInput: no layer keeps thin features."""
        caches = [getattr(layer, "cache", None) for layer in spec.stack.layers]
        if not any(cache is not None and cache.kind == "low-rank" for cache in caches):
            raise BadInput(NONE_SHRUNK)

    def attach(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """Freeze everything but the factors; `finish` undoes it."""
        factors = {id(f) for a in _attentions(model) for m in (a.k, a.v) for f in (m.factor_a, m.factor_b)}
        self.trained = [(p, p.requires_grad) for p in model.parameters()]
        for parameter, _ in self.trained:
            parameter.requires_grad_(id(parameter) in factors)

    def forward(self, model: nn.Module, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        attentions = _attentions(model)
        read: dict[int, Tensor] = {}
        with inference(model), inputs_of(_keys(attentions), read.__setitem__):
            model(batch, **context)
        real = _real(batch)
        parts = []
        for i, attention in enumerate(attentions):
            key, value = (_squared(made, again, real) for made, again in _made_again(attention, read[i]))
            parts.append(torch.stack([key, value]))
        count = real.sum()
        total = torch.stack(parts).sum(dim=0)
        return Loss(total.sum(), count, {"key_loss": total[0].detach(), "value_loss": total[1].detach()})

    def finish(self, model: nn.Module, data: Any) -> Findings | None:
        """The share of keys and values that is lost, ||K - K^||^2 / ||K||^2, by layer. Metrics: `key_error`, `value_error`, their means."""
        for parameter, before in self.trained:
            parameter.requires_grad_(before)
        attentions = _attentions(model)
        lines: list[list[Any]] = []
        device = next(model.parameters()).device
        read: dict[int, Tensor] = {}
        with inference(model), inputs_of(_keys(attentions), read.__setitem__):
            rows = next(batches(data.validation, 16, 1, device))
            model(rows)
            real = _real(rows)
            for i, attention in enumerate(attentions):
                shares = [_squared(a, b, real) / _squared(a, torch.zeros_like(a), real) for a, b in _made_again(attention, read[i])]
                lines.append([i, *(share.item() for share in shares)])
        means = {name: sum(line[j] for line in lines) / len(lines) for j, name in ((1, "key_error"), (2, "value_error"))}
        return Findings(means, tables=[Table("Keys and values lost in thin features", ["layer", "key", "value"], lines)])


def _attentions(model: nn.Module) -> list[Any]:
    """The attention of every layer that keeps thin features, first layer first."""
    found = [m for m in model.modules() if isinstance(m, Attention) and isinstance(m.k, Shrunk) and not m.cross]
    if not found:
        raise BadInput(NONE_SHRUNK)
    return found


def _keys(attentions: list[Any]) -> dict[int, nn.Module]:
    """The linear that makes each attention's keys, and reads what its values are made from too."""
    return {i: attention.k for i, attention in enumerate(attentions)}


def _made_again(attention: Any, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys, and values, as they are and as the cache would give them back: (b, h, s, d) each."""
    cache = attention.spec.cache
    for linear, norm, group in (
        (attention.k, attention.k_norm, None),
        (attention.v, None, cache.group or attention.v.rank // attention.spec.kv_heads),
    ):
        thin = as_stored(linear.shrink(x), cache.window, cache.bits, group)
        with torch.no_grad():
            exact = attention.heads(linear(x), norm)
        yield exact, attention.heads(linear.widen(thin), norm)


def _real(batch: Mapping[str, Any]) -> Tensor:
    """(b, s) which positions are no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _squared(a: Tensor, b: Tensor, real: Tensor) -> Tensor:
    """The sum over real positions of the mean over heads and channels of (a - b)^2."""
    return ((a - b).float().square().mean(dim=(1, 3)) * real).sum()
