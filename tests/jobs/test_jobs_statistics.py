"""Intervals against SciPy's, and what the verdict must do whatever the numbers are."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from layerwise.jobs.statistics import deviation, mean_interval, verdict

numbers = st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=False)
several = st.lists(numbers, min_size=2, max_size=12)


@given(several)
def test_interval_equals_scipys(values: list[float]) -> None:
    mean, interval = mean_interval(values)
    assert interval is not None
    assert mean == pytest.approx(statistics.fmean(values), rel=1e-9, abs=1e-9)
    if deviation(values) > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=statistics.fmean(values), scale=stats.sem(values))
        assert interval == pytest.approx((low, high), rel=1e-6, abs=1e-6)


@given(several)
def test_deviation_divides_by_one_less_than_the_number(values: list[float]) -> None:
    assert deviation(values) == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-6)


def test_interval_at_another_level_equals_scipys() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    expected = stats.t.interval(0.5, 3, loc=3.75, scale=stats.sem(values))
    assert mean_interval(values, level=0.5)[1] == pytest.approx(expected)


def test_one_value_has_a_mean_but_no_interval() -> None:
    assert mean_interval([2.5]) == (2.5, None)
    assert deviation([2.5]) == 0.0


@pytest.mark.parametrize("differences", [[], [-5.0], [0.0], [0.0, 0.0, 0.0], [-1.0, 1.0], [-3.0, -2.0, 9.0]])
@pytest.mark.parametrize("direction", ["lower", "higher"])
def test_too_few_or_undecided_differences_are_inconclusive(differences: list[float], direction: str) -> None:
    assert verdict(differences, direction) == "inconclusive"


@pytest.mark.parametrize(
    ("differences", "lower"), [([-1.0, -1.1, -0.9], "holds"), ([1.0, 1.1, 0.9], "fails"), ([-2.0, -2.0], "holds"), ([2.0, 2.0], "fails")]
)
def test_direction_turns_the_verdict_round(differences: list[float], lower: str) -> None:
    assert verdict(differences, "lower") == lower
    assert verdict(differences, "higher") == {"holds": "fails", "fails": "holds"}[lower]


@given(several)
def test_mirrored_differences_and_direction_give_the_same_verdict(differences: list[float]) -> None:
    assert verdict(differences, "lower") == verdict([-d for d in differences], "higher")


@given(several)
def test_verdict_agrees_with_the_paired_t_test(differences: list[float]) -> None:
    if deviation(differences) < 1e-6:
        return
    test = stats.ttest_1samp(differences, 0.0)
    if abs(test.pvalue - 0.05) < 1e-9:
        return
    expected = "inconclusive" if test.pvalue > 0.05 else "holds" if test.statistic < 0 else "fails"
    assert verdict(differences, "lower") == expected


@given(several, st.randoms(use_true_random=False))
def test_order_of_seeds_does_not_matter(differences: list[float], random) -> None:
    shuffled = differences.copy()
    random.shuffle(shuffled)
    assert mean_interval(shuffled) == mean_interval(differences)


@given(st.lists(st.floats(-1e3, -1e-3), min_size=2, max_size=8))
def test_claim_can_not_fail_when_every_seed_is_better(differences: list[float]) -> None:
    assert verdict(differences, "lower") in ("holds", "inconclusive")
