"""The committed measurements of plans: their verdicts follow from their values, and the page quotes them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from layerwise.jobs.statistics import mean_interval, verdict

ROOT = Path(__file__).resolve().parents[2]
RECEIPTS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "receipts").glob("plan*.json"))}
CASES = [pytest.param(r, t, id=f"{name}-{t['target']}") for name, r in RECEIPTS.items() for t in r["targets"]]
SINGLE = ("layers dropped", "width", "low rank", "bits per layer")
METHODS = (*SINGLE, "bits, uniform", "combination")


@pytest.mark.parametrize(("receipt", "target"), CASES)
def test_verdicts_follow_from_the_values(receipt: dict[str, Any], target: dict[str, Any]) -> None:
    differences = {}
    for seed, plan in target["plan"].items():
        assert plan["bytes"] <= target["target"] * receipt["bytes"]
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


@pytest.mark.parametrize(("receipt", "target"), CASES)
def test_the_page_quotes_the_measurement(receipt: dict[str, Any], target: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "plan.md").read_text()
    for line in [row(receipt, target), *latency_rows(receipt, target)]:
        assert line in text, line


def added(receipt: dict[str, Any], of: dict[str, Any]) -> str:
    """Held-out loss added, the mean over seeds; "-" where a seed has none."""
    whole = receipt["as_it_is"]
    return f"{fmean(one['held_out'] - whole[seed] for seed, one in of.items()):.4f}" if len(of) == len(whole) else "-"


def row(receipt: dict[str, Any], target: dict[str, Any]) -> str:
    """A line of a table in docs/plan.md: held-out losses added, means over seeds."""
    methods = " | ".join(added(receipt, target["methods"][name]) for name in METHODS)
    difference = target["difference"]
    said = "-" if difference["mean"] is None else "{:+.4f} ({:+.4f} to {:+.4f})".format(difference["mean"], *difference["ci95"])
    return f"| {target['target']:g} | {methods} | {said} | {target['verdict']} |"


def latency_rows(receipt: dict[str, Any], target: dict[str, Any]) -> list[str]:
    """Lines about milliseconds over those of the model as it is: as expected, and as measured (least and most of the seeds)."""
    lines = []
    for name in METHODS if "latency" in receipt else ():
        shares = [one["latency"] for one in target["methods"][name].values()]
        if shares:
            expected, measured = fmean(s["expected"] for s in shares), [s["measured"] for s in shares]
            lines.append(f"| {name} | {expected:.2f} | {fmean(measured):.2f} ({min(measured):.2f} to {max(measured):.2f}) |")
    return lines


if __name__ == "__main__":
    for name, receipt in RECEIPTS.items():
        print(name, *(line for t in receipt["targets"] for line in (row(receipt, t), *latency_rows(receipt, t))), sep="\n")
