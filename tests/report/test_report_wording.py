"""Numbers and verdicts in words."""

from __future__ import annotations

from typing import Any

import pytest

from layerwise.report import wording

CLAIM = {"metric": "loss", "method": "a", "baseline": "b"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"), (0.0123456, "0.01235"), (-3.2, "−3.200"), (12345.678, "12,346"), (9.99996, "10.00"),
        (0.00001234, "1.234e−5"), (0.0, "0"), (None, "–"), (float("nan"), "–"), ("text", "text"), (True, "True"), (3e20, "3.000e20"),
    ],
)  # fmt: skip
def test_number(value: Any, text: str) -> None:
    assert wording.number(value) == text


def test_interval_has_the_decimals_of_its_mean() -> None:
    assert wording.interval([-0.06512, -0.0301], -0.0475) == "[−0.06512, −0.03010]"
    assert wording.interval(None) == "–"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4213, "0.42 s"), (12.34, "12.3 s"), (59.97, "1 min 0 s"), (192, "3 min 12 s"), (7500, "2 h 5 min"), (None, "–")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(1, "1 B"), (999.4, "999 B"), (4942080, "4.94 MB"), (2.5e12, "2.5 TB")])
def test_size(count: float, text: str) -> None:
    assert wording.size(count) == text


@pytest.mark.parametrize(
    ("receipt", "claim", "scale", "key"),
    [
        ({"verdict": "holds", "difference": {"ci95": [1, 2]}}, CLAIM, "small", "holds"),
        ({"verdict": "holds", "difference": {"ci95": [1, 2]}}, CLAIM, "smoke", "smoke"),  # whatever a smoke receipt says
        ({"verdict": "inconclusive", "difference": {"mean": 1}}, CLAIM, "small", "seeds"),
        ({"verdict": "inconclusive", "difference": {"ci95": [-1, 2]}}, CLAIM, "small", "inconclusive"),
        ({"verdict": "fails", "variants": {"a": {"diverged": [1]}}}, CLAIM, "small", "diverged"),
        (None, CLAIM, "small", "pending"),
        ({"verdict": None}, None, "small", "none"),
    ],
)
def test_verdict(receipt: dict[str, Any] | None, claim: dict[str, Any] | None, scale: str, key: str) -> None:
    assert wording.verdict_key(receipt, claim, scale) == key
