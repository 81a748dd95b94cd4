"""Which layers get more bits: the important ones, so many that the mean is what was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.errors import BadInput


def allocate(order: Sequence[int], high: int, low: int, mean: float) -> list[int]:
    """Bits of every layer: `high` for the first of `order`, `low` for the rest, so many that their mean is nearest to `mean`.

    Raises:
        BadInput: the mean is not between the two.

    Source: Dumitru et al. 2024, "Layer-Wise Quantization" (arXiv 2406.17415).
    """
    if not low < high or not low <= mean <= high:
        raise BadInput(f"low_bits < bits and a mean_bits between them are needed; got {low}, {high} and {mean}")
    upper = set(order[: many(len(order), high, low, mean)])
    return [high if i in upper else low for i in range(len(order))]


def many(depth: int, high: int, low: int, mean: float) -> int:
    """How many of `depth` layers get the high number of bits."""
    return round(depth * (mean - low) / (high - low))
