"""How few directions the keys and values of a layer really use."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.nn.attention import Attention
from layerwise.stack.spec import StackSpec

LOST = (0.5, 0.8)


def cache_spectrum(model: Model, data: Any, *, split: str = "validation", samples: int = 64, batch: int = 16) -> Findings:
    """Singular values of keys (before rotation and their norm) and of values, all heads of a layer together, over rows of data.

    Metrics: `key_lost_half`, `value_lost_half`, the share of the squared values that goes with the smaller half of the singular values,
    and `key_lost_80`, `value_lost_80` with the smallest 80 %; means over layers. No factors of that rank lose less on this data.

    Source: Wang et al. 2024, "CSKV", figure 1 (arXiv 2409.10593).
    """
    check_spectrum(model.spec)
    watched = {name: m for name, m in model.named_modules() if isinstance(m, Attention) and not m.cross}
    moments: dict[tuple[str, str], Tensor] = {}
    real: list[Tensor | None] = [None]

    def add(key: tuple[str, str]) -> Any:
        def hook(module: Any, given: Any, made: Tensor) -> None:
            rows = (made.flatten(0, 1) if real[0] is None else made[real[0]]).double()
            moments[key] = moments.get(key, 0.0) + rows.T @ rows

        return hook

    handles = [getattr(m, role).register_forward_hook(add((name, role))) for name, m in watched.items() for role in "kv"]
    try:
        with inference(model):
            for rows in batches(split_of(data, split), batch, -(-samples // batch), model.device):
                mask = rows.get("attention_mask")
                real[0] = None if mask is None else mask.bool()
                model(rows)
    finally:
        for handle in handles:
            handle.remove()
    lines: list[list[Cell]] = []
    for i, name in enumerate(watched):
        energies = [_energies(moments[name, role]) for role in "kv"]
        lines.append([i, *(x for e in energies for x in (_needed(e, 0.9), *(_lost(e, share) for share in LOST)))])
    means = [sum(float(line[j] or 0) for line in lines) / len(lines) for j in range(1, 7)]
    metrics = {"key_lost_half": means[1], "key_lost_80": means[2], "value_lost_half": means[4], "value_lost_80": means[5]}
    columns = [f"{what} {of}" for what in ("keys:", "values:") for of in ("channels for 90 %", "lost with half", "lost with 80 %")]
    return Findings(metrics, tables=[Table("Directions of keys and values", ["layer", *columns], lines)])


def check_spectrum(spec: ModelSpec, **_: Any) -> None:
    """Raises BadInput: no layer has keys and values."""
    if not isinstance(spec.stack, StackSpec) or not spec.stack.layers:
        raise BadInput("cache-spectrum looks at keys and values: it needs layers of kind attention")


def _energies(moment: Float[Tensor, "d d"]) -> Float[Tensor, " d"]:
    """Squared singular values as shares of their sum, largest first."""
    values = torch.linalg.eigvalsh(moment).clamp(min=0).flip(0)
    return values / values.sum()


def _needed(energies: Float[Tensor, " d"], share: float) -> int:
    """How many directions hold a share of the sum."""
    return int((energies.cumsum(0) < share).sum()) + 1


def _lost(energies: Float[Tensor, " d"], share: float) -> float:
    """What goes with the smallest share of the directions."""
    return float(energies[len(energies) - int(share * len(energies)) :].sum())
