"""How large the residual stream is between layers, and what learned gates and gains do to it."""

from __future__ import annotations

from typing import Any

import torch

from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.stack.record import record
from layerwise.stack.spec import StackSpec


def stream_variances(
    model: Model, data: Any, *, split: str = "validation", batch: int = 16, batches_at_most: int | None = 4
) -> list[float]:
    """Variance over channels of the stream at every boundary, averaged over real tokens: entering layer 0, ..., leaving the last."""
    total = torch.zeros(model.stack.depth + 1, dtype=torch.float64)
    tokens = 0
    with inference(model):
        for rows in batches(split_of(data, split), batch, batches_at_most, model.device):
            mask = rows.get("attention_mask")
            stream = record(model, rows, hidden="all", inputs=[0]).stream()
            for i, x in enumerate(stream):
                variance = x.double().var(dim=-1, unbiased=False)
                total[i] += (variance if mask is None else variance[mask.bool()]).sum().cpu()
            tokens += int(stream[0].shape[:2].numel() if mask is None else mask.sum())
    return (total / max(tokens, 1)).tolist()


def check_stream(spec: ModelSpec, **_: Any) -> None:
    """Raises BadInput: the layers hand on maps of images or vectors of them, no stream of tokens."""
    if not isinstance(spec.stack, StackSpec):
        raise BadInput("stream-variance looks at the stream of transformer layers; this stack has others")


def stream_variance(model: Model, data: Any, *, split: str = "validation", batch: int = 16, batches_at_most: int | None = 4) -> Findings:
    """The stream's variance by layer, and the factor 1 - SiLU(alpha) of layers that have a gate.

    Metrics: `stream_variance_last`, leaving the last layer; `stream_growth`, that over what leaves the first layer;
    `gate_mean`, mean of SiLU(alpha), and `gates_closing`, the share of gates that make the stream smaller, where there are gates.
    """
    check_stream(model.spec)
    found = stream_variances(model, data, split=split, batch=batch, batches_at_most=batches_at_most)
    factors = [None if getattr(layer, "gate", None) is None else layer.gate.factor().item() for layer in model.stack.layers]
    rows: list[list[Cell]] = [[i, found[i], found[i + 1], factors[i]] for i in range(model.stack.depth)]
    metrics = {"stream_variance_last": found[-1], "stream_growth": found[-1] / max(found[min(1, len(found) - 1)], 1e-300)}
    gated = [1 - f for f in factors if f is not None]
    if gated:
        metrics |= {"gate_mean": sum(gated) / len(gated), "gates_closing": sum(g > 0 for g in gated) / len(gated)}
    return Findings(metrics, [Table("Variance of the stream", ["layer", "entering", "leaving", "factor of the gate"], rows)])
