"""Where attention looks."""

from __future__ import annotations

from typing import Any

from layerwise.analyze.findings import Findings, Table
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.stack.record import record
from layerwise.stack.spec import StackSpec


def layer_entropies(model: Model, data: Any, *, split: str = "validation", batch: int = 8, batches_at_most: int = 2) -> list[float]:
    """Mean entropy (nats) of the attention probabilities of every layer, over heads and positions; one layer's maps at a time in memory."""
    sums = [0.0] * model.stack.depth
    seen = 0
    with inference(model):
        for rows in batches(split_of(data, split), batch, batches_at_most, model.device):
            real = rows["attention_mask"].bool() if "attention_mask" in rows else None
            for i in range(model.stack.depth):
                maps = record(model, rows, attention=[i]).attention[i]
                entropy = -(maps * maps.clamp(min=1e-30).log()).sum(dim=-1).mean(dim=1)
                sums[i] += (entropy if real is None else entropy[real]).mean().item()
            seen += 1
    return [s / max(seen, 1) for s in sums]


def check_entropy(spec: ModelSpec, **_: Any) -> None:
    """Raises BadInput: no layer attends."""
    if not isinstance(spec.stack, StackSpec):
        raise BadInput("attention-entropy looks at maps of attention: it needs layers of kind attention")


def attention_entropy(model: Model, data: Any, *, split: str = "validation", batch: int = 8, batches_at_most: int = 2) -> Findings:
    """Attention entropy by layer. Metric: `attention_entropy`, the mean over layers."""
    check_entropy(model.spec)
    values = layer_entropies(model, data, split=split, batch=batch, batches_at_most=batches_at_most)
    table = Table("Attention entropy by layer", ["layer", "entropy (nats)"], [[i, v] for i, v in enumerate(values)])
    return Findings({"attention_entropy": sum(values) / max(len(values), 1)}, [table])
