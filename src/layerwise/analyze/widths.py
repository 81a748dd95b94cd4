"""How wide each layer is, and what is left of the model that it was cut from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.edit.prune.sparsity import widths_of
from layerwise.errors import BadInput
from layerwise.models.load import described
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.stack.spec import StackSpec


def layer_widths(model: Model, *, of: str | None = None) -> Findings:
    """Heads, inner channels and prunable weights of every layer: those along heads and channels; embeddings, norms and head are none.

    Metrics: `prunable_weights`; with `of`, `kept_share`, of that model's.

    Args:
        of: the model that this one was cut from, a checkpoint's folder (in a job also `stage:NAME`); adds each layer's share of it.

    Raises:
        BadInput: the layers are no transformer layers, or `of` has more or fewer.
    """
    other = None if of is None else described(Path(of))
    check_widths(model.spec, of=other)
    stack: Any = model.spec.stack
    whole: Any = stack if other is None else other.stack
    rows: list[list[Cell]] = []
    totals = [0, 0]
    for i, (now, first) in enumerate(zip(stack.layers, whole.layers, strict=True)):
        weights, before = (widths_of(s.with_layers([layer])).weights() for s, layer in ((stack, now), (whole, first)))
        totals = [totals[0] + weights, totals[1] + before]
        rows.append([i, now.heads, now.kv_heads, now.ffn_width, weights, *([] if of is None else [weights / before])])
    columns = ["layer", "heads", "kv heads", "channels", "weights", *([] if of is None else ["share left"])]
    metrics = {"prunable_weights": float(totals[0])} | ({} if of is None else {"kept_share": totals[0] / max(totals[1], 1)})
    return Findings(metrics, [Table("Widths of layers", columns, rows)])


def check_widths(spec: ModelSpec, *, of: ModelSpec | None, **_: Any) -> None:
    """Raises BadInput: the layers are no transformer layers, or `of` has more or fewer."""
    stacks = [model.stack for model in (spec, of) if model is not None]
    if not all(isinstance(stack, StackSpec) and stack.depth == spec.stack.depth for stack in stacks):
        raise BadInput("layer-widths compares transformer layers, as many in both models")
