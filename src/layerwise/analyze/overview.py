"""One table about every layer of a model."""

from __future__ import annotations

from typing import Any

from layerwise.analyze.attention import layer_entropies
from layerwise.analyze.cost import costs
from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.analyze.gradients import gradient_norms
from layerwise.analyze.similarity import angular_distance
from layerwise.evaluate.batches import batches, split_of
from layerwise.models.model import Model


def inspect(
    model: Model, data: Any, *, split: str = "train", samples: int = 128, batch: int = 16, objective: str | None = None
) -> Findings:
    """Parameters, operations per token, angular distance, attention entropy and gradient norm of every layer.

    Args:
        objective: whose gradients are shown (None: causal-lm for causal models, else masked-lm).
    """
    rows = next(batches(split_of(data, split), 1, 1, model.device))
    tokens = rows["input_ids"].numel()
    cost = costs(model, rows)
    turned = angular_distance(model, data, split=split, samples=samples, batch=batch)
    entropy = layer_entropies(model, data, split=split, batch=min(batch, 8))
    gradients = gradient_norms(model, data, split=split, objective=objective or ("causal-lm" if model.causal else "masked-lm"), batch=batch)
    norms = {row[0]: row[1] for row in gradients.tables[0].rows}
    names = {-1: "embedding", model.stack.depth: "head"}
    table: list[list[Cell]] = []
    for i, c in cost.items():
        inside = 0 <= i < model.stack.depth
        angle = turned.tables[0].rows[i][1] if inside else None
        table.append([names.get(i, i), c.params, round(c.flops / tokens), angle, entropy[i] if inside else None, norms.get(i)])
    columns = ["layer", "parameters", "FLOPs per token", "angular distance", "attention entropy", "gradient norm"]
    found = Findings(turned.metrics | gradients.metrics, [Table("Layers", columns, table), turned.tables[1]], turned.matrices)
    found.metrics["params"] = sum(c.params for c in cost.values())
    found.metrics["flops_per_token"] = sum(c.flops for c in cost.values()) / tokens
    return found
