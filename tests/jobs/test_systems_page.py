"""docs/systems.md: what it says of a claim comes from the receipts, over all scales that have one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerwise.jobs import docs


def receipt(mean: float, params: int, verdict: str, data: str = "builtin:code") -> dict[str, Any]:
    arms = {
        "pre-ln": {"values": {"0": 2.0, "1": 2.0}, "mean": 2.0, "std": 0.0, "seconds": 1.0, "params": params},
        "gpas": {"values": {"0": mean, "1": mean}, "mean": mean, "std": 0.0, "seconds": 1.0, "params": params + 1},
    }
    claim = {"metric": "evaluate.val_loss", "baseline": "pre-ln", "method": "gpas"}
    difference = {"mean": mean - 2, "ci95": [mean - 2.1, mean - 1.9]}
    return {"claim": claim, "variants": arms, "difference": difference, "verdict": verdict, "data": [{"name": data, "sha256": ""}]}


def test_trend_is_shown_from_small_to_large_where_there_are_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_RECEIPTS", str(tmp_path))
    for scale, mean, params, verdict, data in (("small", 1.75, 900, "holds", "builtin:code"), ("tiny", 2.25, 100, "fails", "wikitext-2")):
        (tmp_path / scale).mkdir()
        (tmp_path / scale / "gpas.json").write_text(json.dumps(receipt(mean, params, verdict, data)))
    text = docs.page()
    section = text.split("\n## gpas\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith(("| tiny", "| small"))]
    assert rows == [
        "| tiny | wikitext-2 | 101 | 2 | 2.25 | +0.25 [+0.15, +0.35] | 2 | **fails** |",
        "| small | builtin:code | 901 | 2 | 1.75 | -0.25 [-0.35, -0.15] | 2 | **holds** |",
    ]
    assert text.count("Over scales:") == 1


def test_a_scale_that_compares_other_arms_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_RECEIPTS", str(tmp_path))
    other = receipt(2.25, 100, "fails")
    other["variants"]["mix-ln"], other["claim"]["baseline"] = other["variants"].pop("pre-ln"), "mix-ln"
    for scale, made in (("small", receipt(1.75, 900, "holds")), ("mini", other)):
        (tmp_path / scale).mkdir()
        (tmp_path / scale / "gpas.json").write_text(json.dumps(made))
    text = docs.page()
    assert "| mini (gpas against mix-ln) | builtin:code | 101 |" in text and "| small | builtin:code | 901 |" in text


def test_one_receipt_is_no_trend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_RECEIPTS", str(tmp_path))
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "gpas.json").write_text(json.dumps(receipt(1.5, 900, "holds")))
    assert "Over scales:" not in docs.page()
