"""One table about every layer of a model."""

from __future__ import annotations

import dataclasses
from typing import Any

from layerwise.analyze.attention import layer_entropies
from layerwise.analyze.cost import costs
from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.analyze.gradients import gradient_norms
from layerwise.analyze.similarity import angular_distance
from layerwise.embed.patches import PatchEmbedding
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model, rebuilt
from layerwise.stack.spec import StackSpec


def inspect(
    model: Model, data: Any, *, split: str = "train", samples: int = 128, batch: int = 16, objective: str | None = None
) -> Findings:
    """Parameters, operations per token, angular distance, attention entropy and gradient norm of every layer.

    A patch of an image is a token, and sound has frames; operations of convolutions are counted per image, and they have neither an angle, since their maps
    change size, nor attention.

    Of an encoder-decoder the encoder is looked at: any text runs through that.

    Args:
        objective: whose gradients are shown (None: that of the model's head; without a head there are none).
    """
    if isinstance(model, Model) and model.decoder is not None:
        model = rebuilt(model, dataclasses.replace(model.spec, decoder=None, target=None, head=None))
    rows = next(batches(split_of(data, split), 1, 1, model.device))
    unit, units = _units(model, rows)
    with inference(model):  # of a single row batch norms could not tell a variance, and would count it
        cost = costs(model, rows)
    found, angles, entropy = Findings(), {}, {}
    if isinstance(model.stack.spec, StackSpec):
        found = angular_distance(model, data, split=split, samples=samples, batch=batch)
        angles = {row[0]: row[1] for row in found.tables.pop(0).rows}
        entropy = dict(enumerate(layer_entropies(model, data, split=split, batch=min(batch, 8))))
    norms: dict[Cell, Cell] = {}
    objective = objective or _objective(model, rows, data)
    if objective is not None:
        gradients = gradient_norms(model, data, split=split, objective=objective, batch=batch)
        norms = {row[0]: row[1] for row in gradients.tables[0].rows}
        found.metrics |= gradients.metrics
    names = {-1: "embedding", model.stack.depth: "head"}
    table: list[list[Cell]] = [
        [names.get(i, i), c.params, round(c.flops / units), angles.get(i), entropy.get(i), norms.get(i)] for i, c in cost.items()
    ]
    columns = ["layer", "parameters", f"FLOPs per {unit}", "angular distance", "attention entropy", "gradient norm"]
    found.tables.insert(0, Table("Layers", columns, table))
    found.metrics["params"] = sum(c.params for c in cost.values())
    found.metrics[f"flops_per_{unit}"] = sum(c.flops for c in cost.values()) / units
    return found


def _units(model: Model, rows: dict[str, Any]) -> tuple[str, int]:
    """What operations are counted by, and how many of them a batch holds."""
    if "input_ids" in rows:
        return "token", rows["input_ids"].numel()
    if "input_values" in rows or "input_features" in rows:
        return "frame", model.embedding(rows).shape[:2].numel()
    if not isinstance(model.embedding, PatchEmbedding):
        return "image", len(rows["pixel_values"])
    down, right = model.embedding.grid(rows["pixel_values"])
    return "token", len(rows["pixel_values"]) * (model.embedding.spec.prefix + down * right)


def _objective(model: Model, rows: dict[str, Any], data: Any) -> str | None:
    """What a model with such a head is trained for; None where the data cannot tell: no labels, no token that masks."""
    head = model.spec.head
    if head is None or head.kind == "projection":
        return None
    if head.kind == "classifier":
        return "classification" if "labels" in rows and head.pool != "none" else None
    if model.causal:
        return "causal-lm"
    return "masked-lm" if getattr(data, "mask_id", None) is not None else None
