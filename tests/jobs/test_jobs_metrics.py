"""What a stage can measure is known beforehand, and the tables that say it agree with what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layerwise.analyze import ANALYSES
from layerwise.errors import BadInput
from layerwise.evaluate import EVALUATIONS
from layerwise.jobs import metrics
from layerwise.jobs.catalogue import find
from layerwise.jobs.metrics import is_among, measurable
from layerwise.jobs.run import run_job
from layerwise.jobs.schema import Stage, read_job
from layerwise.objectives import OBJECTIVES
from layerwise.train.policies import POLICIES
from layerwise.train.spec import TrainSpec

RECEIPTS = sorted((Path(__file__).resolve().parents[2] / "receipts" / "small").glob("*.json"))
TRAIN = {"train": "causal-lm", "steps": 2, "batch": 4}
LAYER = {"heads": 2, "gate": "gpas"}
JOB: dict[str, Any] = {
    "name": "tiny",
    "data": {"length": 32, "tokenizer": {"kind": "bytes"}},
    "model": {"preset": "decoder", "stack": {"depth": 3, "width": 16, "layer": {"heads": 2}}},
    "stages": {
        "fit": TRAIN | {"policies": [{"name": n} for n in ("gradient-norms", "layer-cost", "ledger", "rotation")]},
        **{name: {"analyze": name} for name in metrics.ANALYSES if name not in ("block-drop", "block-sweep", "bits-curve", "cache-errors")},
        "layer-widths": {"analyze": "layer-widths", "of": "stage:fit"},
        "block-drop": {"analyze": "block-drop", "count": 1},
        "block-sweep": {"analyze": "block-sweep", "lengths": [1], "samples": 8},
        "language-modeling": {"evaluate": "language-modeling", "batches_at_most": 1},
        "embedding-agreement": {"evaluate": "embedding-agreement", "other": "stage:fit", "batches_at_most": 2},
        "out": {"export": "hf"},
        "shrink": {"edit": "shrink-cache", "density": 0.5},
        "cache-errors": {"analyze": "cache-errors"},
    },
}
SOMETIMES = {"fc2_grad_ratio", "gate_mean", "gates_closing", "flops_per_*"}


def possible(stage: Stage) -> tuple[str, ...] | None:
    policies = [p["name"] for p in stage.spec.policies] if isinstance(stage.spec, TrainSpec) else ()
    return measurable(stage.kind, stage.what, policies)


def test_rows_are_of_things_that_are_there() -> None:
    for rows, table in (
        (metrics.OBJECTIVES, OBJECTIVES), (metrics.POLICIES, POLICIES), (metrics.ANALYSES, ANALYSES), (metrics.EVALUATIONS, EVALUATIONS)
    ):  # fmt: skip
        assert rows.keys() <= table.keys()


def test_what_a_row_says_is_what_is_measured(verses: Path, tmp_path: Path) -> None:
    job = read_job(JOB | {"data": {**JOB["data"], "source": f"path:{verses}"}})
    (plan,) = job.plans().values()
    measured = run_job(job, tmp_path / "run").metrics["default"]
    for stage in plan.stages:
        rows = possible(stage)
        assert rows is not None
        found = {m.removeprefix(f"{stage.name}.") for m in measured if m.startswith(f"{stage.name}.")}
        assert not (more := [m for m in found if not is_among(m, rows)]), f"add to jobs/metrics.py what {stage.name} measures: {more}"
        assert set(rows) - found <= SOMETIMES, (stage.name, set(rows) - found)


@pytest.mark.parametrize("receipt", RECEIPTS, ids=lambda path: path.stem)
def test_receipts_have_nothing_that_the_rows_do_not(receipt: Path) -> None:
    job = read_job(find(receipt.stem), scale="small")
    variants = json.loads(receipt.read_text())["metrics"]
    for name, plan in job.plans().items():
        for stage in plan.stages:
            rows = possible(stage)
            reach = [metric for metric, wanted in job.reach.items() if wanted.stage == stage.name]
            for metric in variants.get(name, {}):
                left, _, plain = metric.rpartition(".")
                assert left != stage.name or rows is None or plain in reach or is_among(plain, rows), metric


CLAIM = {"text": "x", "direction": "lower", "method": "a", "baseline": "b"}


def _claiming(metric: str, **more: Any) -> None:
    read_job(
        JOB | {"claim": CLAIM | {"metric": metric}, "variants": {"a": {}, "b": {"model.stack.depth": 2}}} | more,
    )


@pytest.mark.parametrize(
    "metric", ["language-modeling.val_loss", "val_loss", "fit.train_loss", "fit.rotation_min", "inspect.flops_per_token", "fit.cost_to_it"]
)
def test_a_claim_on_what_is_measured_passes(metric: str) -> None:
    _claiming(metric, reach={"cost_to_it": {"stage": "fit", "target": "b"}})


@pytest.mark.parametrize(
    "metric", ["language-modeling.accuracy", "fit.val_loss", "accuracy", "out.val_loss", "language-modeling.vall_loss"]
)
def test_a_claim_on_what_is_not_measured_is_refused_before_the_run(metric: str) -> None:
    with pytest.raises(BadInput, match=rf"claim.metric: no stage of 'a' measures '{metric}'.*language-modeling\.val_loss"):
        _claiming(metric)


def test_what_has_no_row_is_looked_at_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(metrics.EVALUATIONS, "language-modeling")
    _claiming("language-modeling.anything")
    with pytest.raises(BadInput, match="measures"):
        _claiming("fit.anything")
