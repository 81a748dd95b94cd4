"""How well a language model predicts held-out text."""

from __future__ import annotations

import math
from typing import Any

import torch

from layerwise.analyze.findings import Findings
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.objectives.language import CausalLM, MaskedLM
from layerwise.stack.stack import checked_path


def language_modeling(
    model: Model,
    data: Any,
    *,
    split: str = "validation",
    batch: int = 16,
    batches_at_most: int | None = None,
    path: list[int] | None = None,
) -> Findings:
    """Next-token prediction on a split.

    Metrics: `val_loss` (nats a token), `perplexity`, `normalized_loss` (val_loss / log vocabulary: 1 is uniform guessing).

    Args:
        path: run this path of layers instead of all of them in order.
    """
    total, count = _sums(model, CausalLM(), data, split, batch, batches_at_most, path=path)
    loss = total / count
    uniform = math.log(len(model.token_matrix))
    return Findings({"val_loss": loss, "perplexity": math.exp(min(loss, 700)), "normalized_loss": loss / uniform})


def check_path(spec: ModelSpec, *, path: list[int] | None, **_: Any) -> None:
    """Raises BadInput: the path names a layer that is not there."""
    checked_path(path or (), spec.stack.depth)


def masked_language_modeling(
    model: Model, data: Any, *, split: str = "validation", batch: int = 16, batches_at_most: int | None = None, rate: float = 0.15
) -> Findings:
    """Prediction of masked tokens on a split, with a fixed choice of what is masked. Metrics: `val_loss`, `perplexity`."""
    total, count = _sums(model, MaskedLM(data, rate=rate).to(model.device), data, split, batch, batches_at_most)
    return Findings({"val_loss": total / count, "perplexity": math.exp(min(total / count, 700))})


def _sums(model: Model, objective: Any, data: Any, split: str, batch: int, limit: int | None, **context: Any) -> tuple[float, float]:
    generator = torch.Generator(device=model.device).manual_seed(0)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    count = torch.zeros((), dtype=torch.long, device=model.device)
    with inference(model):
        for rows in batches(split_of(data, split), batch, limit, model.device):
            loss = objective(model, rows, generator, **context)
            total += loss.total
            count += loss.count
    return total.item(), count.item()
