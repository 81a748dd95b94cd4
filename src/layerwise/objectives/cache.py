"""Thin features that keys and values can be made from again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from layerwise.analyze.findings import Findings
from layerwise.analyze.thin_features import cache_errors, check_thin, made_again, read_by, real_tokens, shrunk_attentions, squared
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective


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

    check = staticmethod(check_thin)

    def attach(self, model: Any, batch: Mapping[str, Any]) -> None:
        """Freeze everything but the factors; `finish` undoes it."""
        self.check(model.spec)
        factors = {id(f) for a in shrunk_attentions(model) for m in (a.k, a.v) for f in (m.factor_a, m.factor_b)}
        self.trained = [(p, p.requires_grad) for p in model.parameters()]
        for parameter, _ in self.trained:
            parameter.requires_grad_(id(parameter) in factors)

    def forward(self, model: nn.Module, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        attentions = shrunk_attentions(model)
        read, real = read_by(model, attentions, batch, **context), real_tokens(batch)
        parts = []
        for i, attention in enumerate(attentions):
            key, value = (squared(exact - again, real) for exact, again in made_again(attention, read[i]))
            parts.append(torch.stack([key, value]))
        count = real.sum()
        total = torch.stack(parts).sum(dim=0)
        return Loss(total.sum(), count, {"key_loss": total[0].detach(), "value_loss": total[1].detach()})

    def finish(self, model: Any, data: Any) -> Findings | None:
        """What the factors lose of keys and values of validation rows; see `cache_errors`."""
        for parameter, before in self.trained:
            parameter.requires_grad_(before)
        return cache_errors(model, data)
