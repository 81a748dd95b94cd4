"""What a set of seeds says about a claim: paired differences and their interval. Never judged by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from scipy import stats

Verdict = Literal["holds", "fails", "inconclusive"]


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, tuple[float, float] | None]:
    """Mean and Student-t interval of its expectation; no interval for fewer than two values."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    error = deviation(values) / math.sqrt(len(values))
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * error
    return mean, (mean - half, mean + half)


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1); 0 for a single value."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def verdict(differences: Sequence[float], direction: Literal["lower", "higher"]) -> Verdict:
    """Whether paired differences (method - baseline, one a seed) bear out a claim.

    It holds when the whole 95 % interval of their mean lies on the claimed side of zero, fails when it lies on the other
    side, and is inconclusive otherwise, in particular for fewer than two seeds.
    """
    if not differences:
        return "inconclusive"
    _, interval = mean_interval(differences)
    if interval is None:
        return "inconclusive"
    low, high = interval if direction == "lower" else (-interval[1], -interval[0])
    if high < 0:
        return "holds"
    return "fails" if low > 0 else "inconclusive"


def rank_correlation(points: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation of pairs; None for fewer than three different first or two different second values."""
    if len({x for x, _ in points}) < 3 or len({y for _, y in points}) < 2:
        return None
    return float(stats.spearmanr(*zip(*points, strict=True)).statistic)
