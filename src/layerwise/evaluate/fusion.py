"""How accurate the mixtures of two networks are, from the one to the other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch

from layerwise.analyze.findings import Findings, Table
from layerwise.edit.merging.transport import By, Solver, check_alike, ot_fuse
from layerwise.errors import BadInput
from layerwise.evaluate.accuracy import classification
from layerwise.models.load import load_any
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec


def fusion_curve(
    model: Model,
    data: Any,
    *,
    other: str | Model,
    weights: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    by: By = "activations",
    match: Literal["transport", "none"] = "transport",
    solver: Solver = "exact",
    samples: int = 200,
    split: str = "validation",
) -> Findings:
    """Accuracy of (1 - w) other + w this for every w of `weights`, the other's neurons brought into this one's order first.

    Metrics: `curve_best`, the highest, at `curve_weight`; `curve_mean` over all weights; `curve_ends`, the better of both networks alone.
    Source: Singh and Jaggi 2020, "Model Fusion via Optimal Transport", section 5.1 (arXiv 1910.05653).

    Args:
        other, by, match, solver, samples: see `layerwise.edit.merging.transport.ot_fuse`.
    """
    theirs = other if isinstance(other, Model) else load_any(other, str(model.device))
    check_fusion(model.spec, other=theirs.spec, weights=weights, match=match)
    aligned = ot_fuse(model, data, other=theirs, weight=0.0, by=by, match=match, solver=solver, samples=samples)
    mixed = copy.deepcopy(model)
    ends = [aligned.state_dict(), model.state_dict()]

    def accuracy(weight: float) -> float:
        with torch.no_grad():
            for name, tensor in mixed.state_dict().items():
                there, here = (state[name] for state in ends)
                tensor.copy_(torch.lerp(there, here, weight) if tensor.is_floating_point() else here)
        return classification(mixed, data, splits=(split,)).metrics["accuracy"]

    curve = {w: accuracy(w) for w in weights}
    best = max(curve, key=lambda w: curve[w])
    found = {"curve_best": curve[best], "curve_weight": best, "curve_mean": sum(curve.values()) / len(curve)}
    found["curve_ends"] = max(accuracy(0.0), accuracy(1.0))
    return Findings(
        found, tables=[Table("Accuracy by the weight of this network", ["weight", "accuracy"], [[w, a] for w, a in curve.items()])]
    )


def check_fusion(
    spec: ModelSpec, *, other: ModelSpec, weights: Sequence[float], match: Literal["transport", "none"] = "transport", **_: Any
) -> None:
    """Raises BadInput: no weights or one outside [0, 1], or networks that cannot be fused."""
    if not weights or not all(0 <= w <= 1 for w in weights):
        raise BadInput(f"weights lie in [0, 1] and are at least one; got {list(weights)}")
    check_alike(spec, other, match=match)
