"""Loss against mean bits, for the orders in which layers could lose theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.analyze.scores import By, layer_order
from layerwise.edit.quantization.quantize import preview_quantize, quantize
from layerwise.errors import BadInput
from layerwise.evaluate.language import language_modeling
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec


def bits_curve(
    model: Model,
    data: Any,
    *,
    bits: int = 4,
    low_bits: int = 2,
    lowered: Sequence[int] | None = None,
    by: By = "input-modification",
    reverse: bool = False,
    draws: int = 10,
    remove: bool = False,
    method: Literal["rtn", "gptq"] = "rtn",
    group: int | None = None,
    samples: int = 64,
    split: str = "validation",
    batch: int = 32,
    batches_at_most: int = 8,
    seed: int | None = None,
) -> Findings:
    """Loss on a split with the k least important layers at `low_bits` and the others at `bits`, for every k in `lowered`.

    Scores come from training rows and the model as it is. By `random` it is the mean over `draws` orders: one says little.

    Args:
        lowered: numbers of layers (None: all of them, 0 to depth). remove: take the k layers out instead, and quantize nothing.

    Metrics: `curve_loss`, the mean over `lowered`; `curve_added`, above the model as it is.
    Source: Dumitru et al. 2024, "Layer-Wise Quantization" (arXiv 2406.17415).
    """
    check_curve(model.spec, bits=bits, low_bits=low_bits, lowered=lowered, group=group, method=method)
    depth = model.stack.depth
    counts = list(range(depth + 1)) if lowered is None else list(lowered)
    times = draws if by == "random" else 1
    orders = [layer_order(model, data, by, reverse=reverse, samples=samples, seed=(seed or 0) * draws + d) for d in range(times)]
    known: dict[tuple[int, ...], float] = {}

    def loss(gone: frozenset[int]) -> float:
        key = tuple(sorted(gone))
        if key not in known:
            made, path = model, None
            if remove:
                path = [i for i in range(depth) if i not in gone]
            else:
                plan = [low_bits if i in gone else bits for i in range(depth)]
                made = quantize(model, data, bits=plan, method=method, group=group, samples=samples, seed=seed)
            found = language_modeling(made, data, split=split, batch=batch, batches_at_most=batches_at_most, path=path)
            known[key] = found.metrics["val_loss"]
        return known[key]

    whole = language_modeling(model, data, split=split, batch=batch, batches_at_most=batches_at_most).metrics["val_loss"]
    losses = [sum(loss(frozenset(order[depth - k :])) for order in orders) / len(orders) for k in counts]
    rows: list[list[Cell]] = [[k, (k * low_bits + (depth - k) * bits) / depth, one] for k, one in zip(counts, losses, strict=True)]
    mean = sum(losses) / len(losses)
    title = "Loss without the k least important layers" if remove else "Loss with the k least important layers in fewer bits"
    return Findings({"curve_loss": mean, "curve_added": mean - whole}, [Table(title, ["k", "mean bits", "loss"], rows)])


def check_curve(
    spec: ModelSpec, *, bits: int, low_bits: int, lowered: Sequence[int] | None, group: int | None, method: Literal["rtn", "gptq"], **_: Any
) -> None:
    """Raises BadInput: the model cannot be quantized so, or `lowered` is empty or counts layers that are not there."""
    preview_quantize(spec, bits=bits, low_bits=low_bits, mean_bits=float(bits), group=group, method=method)
    if lowered is not None and not lowered:
        raise BadInput("lowered names no number of layers: give some, or leave it out for all")
    bad = [k for k in lowered or () if not 0 <= k <= spec.stack.depth]
    if bad:
        raise BadInput(f"lowered counts layers of a stack of {spec.stack.depth}; got {bad[0]}")
