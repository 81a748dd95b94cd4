"""What a receipt concludes from its values."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from layerwise.jobs.receipt import Receipt, Variant, commit, judged, make_receipt, related
from layerwise.jobs.schema import Claim, Relation, read_job

CLAIM = Claim(text="t", metric="val_loss", direction="lower", method="new", baseline="old", paper_ratio=0.9)


def arms(new: list[float], old: list[float], **more: Any) -> dict[str, Variant]:
    def values(numbers: list[float]) -> dict[str, float]:
        return {str(seed): value for seed, value in enumerate(numbers)}

    return {"old": Variant(values=values(old)), "new": Variant(values=values(new), **more)}


def test_difference_is_paired_by_seed_and_equals_scipys() -> None:
    new, old = [1.0, 1.3, 0.8], [1.5, 1.7, 1.4]
    variants = arms(new, old)
    difference, verdict = judged(CLAIM, "small", variants)
    test = stats.ttest_rel(new, old)
    assert difference is not None
    assert difference.mean == pytest.approx(sum(new) / 3 - sum(old) / 3)
    assert difference.ci95 == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert difference.ratio == pytest.approx(sum(new) / sum(old))
    assert verdict == "holds"
    assert variants["new"].mean == pytest.approx(sum(new) / 3)
    assert variants["new"].std == pytest.approx(stats.tstd(new))
    assert variants["new"].ci95 == pytest.approx(stats.t.interval(0.95, 2, sum(new) / 3, stats.sem(new)))


def test_order_of_seeds_within_an_arm_does_not_matter() -> None:
    variants = {"old": Variant(values={"0": 1.0, "1": 2.0}), "new": Variant(values={"1": 1.9, "0": 0.9})}
    difference, _ = judged(CLAIM, "small", variants)
    assert difference is not None and difference.mean == pytest.approx(-0.1)


def test_seeds_that_only_one_arm_has_do_not_count() -> None:
    variants = {"old": Variant(values={"0": 1.0, "1": 2.0, "2": 99.0}), "new": Variant(values={"0": 0.5, "1": 1.5})}
    difference, _ = judged(CLAIM, "small", variants)
    assert difference is not None and difference.mean == pytest.approx(-0.5)


@pytest.mark.parametrize(("direction", "expected"), [("lower", "holds"), ("higher", "fails")])
def test_direction_decides_which_side_is_better(direction: str, expected: str) -> None:
    claim = CLAIM.model_copy(update={"direction": direction})
    assert judged(claim, "full", arms([1.0, 1.1], [2.0, 2.1]))[1] == expected


def test_smoke_scale_claims_nothing_however_clear_the_values() -> None:
    difference, verdict = judged(CLAIM, "smoke", arms([1.0, 1.1, 1.0], [2.0, 2.1, 2.0]))
    assert verdict == "inconclusive" and difference is not None


def test_one_seed_claims_nothing() -> None:
    difference, verdict = judged(CLAIM, "small", arms([1.0], [2.0]))
    assert verdict == "inconclusive"
    assert difference is not None and difference.mean == -1.0 and difference.ci95 is None


def test_method_that_diverges_fails_however_good_its_other_seeds() -> None:
    assert judged(CLAIM, "small", arms([1.0, 1.1], [2.0, 2.1, 2.0], diverged=[2]))[1] == "fails"


def test_method_that_always_diverges_fails_without_a_difference() -> None:
    assert judged(CLAIM, "small", arms([], [2.0, 2.1], diverged=[0, 1])) == (None, "fails")


def test_baseline_that_diverges_proves_nothing_by_itself() -> None:
    variants = arms([1.0, 1.1], [])
    variants["old"].diverged = [0, 1]
    assert judged(CLAIM, "small", variants) == (None, "inconclusive")


def test_without_a_claim_there_is_neither_difference_nor_verdict() -> None:
    assert judged(None, "small", arms([1.0], [2.0])) == (None, None)


def test_baseline_of_zero_leaves_the_ratio_out() -> None:
    difference, _ = judged(CLAIM, "small", arms([1.0, 1.0], [0.0, 0.0]))
    assert difference is not None and difference.ratio is None


def receipt(**changes: Any) -> Receipt:
    job = read_job(
        {
            "name": "tiny",
            "model": {"preset": "decoder"},
            "stages": {"e": {"evaluate": "language-modeling"}},
            "variants": {"old": {}, "new": {"model.stack.depth": 2}},
            "claim": CLAIM.model_dump(),
            "seeds": [0, 1],
            "relations": [{"x": "e.a", "y": "e.b"}],
            "notes": ["a note"],
            **changes,
        }
    )
    metrics = {"old": {"e.val_loss": {"0": 2.0, "1": 2.2}}, "new": {"e.val_loss": {"0": 1.0, "1": 1.1}}}
    return make_receipt(job, arms([1.0, 1.1], [2.0, 2.2]), metrics, [{"name": "d", "sha256": "0"}], "cpu")


def test_receipt_survives_json_and_calls_its_format_schema() -> None:
    made = receipt()
    text = json.dumps(made.dump(), allow_nan=False)
    assert json.loads(text)["schema"] == 1 and "schema_" not in text
    assert Receipt.model_validate(json.loads(text)) == made


def test_receipt_says_what_it_ran_on_and_with() -> None:
    made = receipt()
    assert made.environment.keys() >= {"layerwise", "torch", "python", "platform", "device", "threads", "commit", "date"}
    assert made.environment["commit"] == commit()
    assert made.notes == ["a note"]


def test_smoke_receipt_says_that_it_claims_nothing() -> None:
    made = receipt(scale="smoke")
    assert made.verdict == "inconclusive"
    assert any("claims nothing" in note for note in made.notes)


def test_receipt_names_the_seeds_that_diverged() -> None:
    job = read_job({"name": "tiny", "model": {"preset": "decoder"}, "stages": {"e": {"evaluate": "language-modeling"}}})
    made = make_receipt(job, {"default": Variant(diverged=[1])}, {}, [], "cpu")
    assert any("default: seeds [1]" in note for note in made.notes)
    assert made.verdict is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_receipt_refuses_values_that_json_cannot_hold(value: float) -> None:
    with pytest.raises(ValidationError):
        Variant(values={"0": value})


def test_receipt_refuses_unknown_keys_and_other_formats() -> None:
    plain = receipt().dump()
    for change in ({"verdit": "holds"}, {"schema": 2}, {"verdict": "maybe"}):
        with pytest.raises(ValidationError):
            Receipt.model_validate({**plain, **change})


pairs = st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=3, max_size=20)


@given(pairs)
def test_relation_equals_scipys_rank_correlation(points: list[tuple[int, int]]) -> None:
    metrics = {
        f"arm {i % 3}": {
            "x": {str(j): float(p[0]) for j, p in enumerate(points) if j % 3 == i % 3},
            "y": {str(j): float(p[1]) for j, p in enumerate(points) if j % 3 == i % 3},
        }
        for i in range(3)
    }
    found = related(Relation(x="x", y="y"), metrics)
    assert found["points"] == len(points)
    xs, ys = zip(*points, strict=True)
    if len(set(xs)) < 3 or len(set(ys)) < 2:
        assert found["spearman"] is None
    else:
        assert found["spearman"] == pytest.approx(stats.spearmanr(xs, ys).statistic)


def test_relation_counts_only_what_reaches_its_conditions() -> None:
    metrics = {
        "a": {"x": {"0": 1.0, "1": 2.0}, "y": {"0": 1.0, "1": 2.0}, "fit": {"0": 1.0, "1": 0.5}},
        "b": {"x": {"0": 3.0, "1": 4.0}, "y": {"0": 3.0}, "fit": {"0": 1.0, "1": 1.0}},
        "c": {"x": {"0": 5.0}, "y": {"0": 0.0}},
        "d": {"x": {"0": 9.0}, "y": {"0": 9.0}, "fit": {"0": 1.0}},
    }
    found = related(Relation(x="x", y="y", above={"fit": 1.0}), metrics)
    assert found["points"] == 3 and found["spearman"] == pytest.approx(1.0)


def test_relation_of_too_few_points_has_no_number() -> None:
    assert related(Relation(x="x", y="y"), {"a": {"x": {"0": 1.0}, "y": {"0": 1.0}}})["spearman"] is None
    assert related(Relation(x="x", y="y"), {})["points"] == 0
