"""The committed measurement of plans: its verdicts follow from its values, and the page quotes it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from layerwise.jobs.statistics import mean_interval, verdict

ROOT = Path(__file__).resolve().parents[2]
RECEIPT = json.loads((ROOT / "receipts" / "plan.json").read_text())
SINGLE = ("layers dropped", "width", "low rank", "bits per layer")


@pytest.mark.parametrize("target", RECEIPT["targets"], ids=lambda t: str(t["target"]))
def test_verdicts_follow_from_the_values(target: dict[str, Any]) -> None:
    differences = {}
    for seed, plan in target["plan"].items():
        assert plan["bytes"] <= target["target"] * RECEIPT["bytes"]
        reached = {name: target["methods"][name][seed] for name in SINGLE if seed in target["methods"][name]}
        if not reached:
            continue  # only combinations are so small
        rival = min(reached, key=lambda name: reached[name]["loss"])
        assert target["rival"][seed] == rival
        differences[seed] = plan["held_out"] - reached[rival]["held_out"]
    assert target["difference"]["values"] == pytest.approx(differences)
    if differences:
        mean, interval = mean_interval(list(differences.values()))
        assert target["difference"]["mean"] == pytest.approx(mean) and target["difference"]["ci95"] == pytest.approx(list(interval or ()))
    assert target["verdict"] == verdict(list(differences.values()), "lower")


@pytest.mark.parametrize("target", RECEIPT["targets"], ids=lambda t: str(t["target"]))
def test_the_page_quotes_the_measurement(target: dict[str, Any]) -> None:
    assert row(target) in (ROOT / "docs" / "plan.md").read_text()


def row(target: dict[str, Any]) -> str:
    """A line of the table in docs/plan.md: held-out losses added, means over seeds."""
    whole = RECEIPT["as_it_is"]

    def added(of: dict[str, Any]) -> str:
        return f"{fmean(one['held_out'] - whole[seed] for seed, one in of.items()):.4f}" if len(of) == len(whole) else "-"

    methods = " | ".join(added(target["methods"][name]) for name in (*SINGLE, "bits, uniform", "combination"))
    difference = target["difference"]
    said = "-" if difference["mean"] is None else "{:+.4f} ({:+.4f} to {:+.4f})".format(difference["mean"], *difference["ci95"])
    return f"| {target['target']:g} | {methods} | {said} | {target['verdict']} |"
