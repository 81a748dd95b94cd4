"""Runs end to end: shared stages, paired arms, what is left behind."""

import json

import pytest
import torch

from layerwise.errors import BadInput, Diverged
from layerwise.jobs.run import resume_run, run_job
from layerwise.jobs.schema import read_job
from layerwise.models.load import load_any


def _job(verses, **changes):
    base = {
        "name": "tiny",
        "data": {"source": f"path:{verses}", "length": 32, "tokenizer": {"kind": "bytes"}},
        "model": {"preset": "decoder", "stack": {"depth": 3, "width": 16, "layer": {"heads": 2}}},
        "stages": {
            "pretrain": {"train": "causal-lm", "steps": 6, "batch": 4, "log_every": 2},
            "cut": {"edit": "drop-layers", "count": 1, "samples": 8},
            "healed": {"evaluate": "language-modeling", "batches_at_most": 2},
        },
        "claim": {"text": "t", "metric": "healed.val_loss", "direction": "lower", "method": "angular", "baseline": "shallow"},
        "variants": {"angular": {}, "shallow": {"stages.cut.rule": "shallowest"}},
        "seeds": [0, 1, 2],
    }
    return read_job(base | changes)


def _events(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def test_variants_share_what_they_have_in_common_and_differ_where_they_differ(verses, tmp_path):
    receipt = run_job(_job(verses), tmp_path / "run")
    finished = {(e["variant"], e["seed"], e["stage"]): e for e in _events(tmp_path / "run") if e["event"] == "stage-finished"}
    assert len(finished) == 2 * 3 * 3
    for seed in (0, 1, 2):
        assert not finished["angular", seed, "pretrain"]["reused"]
        assert finished["shallow", seed, "pretrain"]["reused"]
        assert finished["shallow", seed, "pretrain"]["findings"] == finished["angular", seed, "pretrain"]["findings"]
        assert finished["shallow", seed, "cut"]["removed"] == [1]
    assert set(receipt.variants["angular"].values) == {"0", "1", "2"}
    assert receipt.verdict in ("holds", "fails", "inconclusive")
    assert receipt.variants["angular"].params < 262 * 16 * 3 + 5000 and receipt.variants["angular"].peak_bytes > 0
    assert receipt.data[0]["sha256"] and receipt.environment["threads"] == torch.get_num_threads()
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_another_job_reuses_the_base_model_and_its_curve(verses, tmp_path):
    first = run_job(_job(verses, seeds=[7]), tmp_path / "one")
    second = _job(verses, name="other", seeds=[7])
    stages = {**second.stages, "again": {"evaluate": "language-modeling", "batches_at_most": 1}}
    run_job(second.model_copy(update={"stages": stages}), tmp_path / "two")
    trained = [e for e in _events(tmp_path / "two") if e["event"] == "stage-finished" and e["stage"] == "pretrain"]
    assert all(e["reused"] for e in trained)
    curves = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    assert [json.loads(line)["loss"] for line in curves[0]] == [json.loads(line)["loss"] for line in curves[1]]
    assert (
        first.variants["angular"].values["7"]
        == json.loads((tmp_path / "two" / "receipt.json").read_text())["metrics"]["angular"]["healed.val_loss"]["7"]
    )


def test_final_models_load_and_equal_the_measured_ones(verses, tmp_path, text):
    from layerwise.evaluate.language import language_modeling

    receipt = run_job(_job(verses, seeds=[0]), tmp_path / "run")
    model = load_any(tmp_path / "run" / "models" / "angular" / "seed-0")
    assert model.stack.depth == 2
    assert language_modeling(model, text, batches_at_most=2).metrics["val_loss"] == pytest.approx(
        receipt.variants["angular"].values["0"], rel=1e-6
    )
    with pytest.raises(BadInput, match="2 models"):
        load_any(tmp_path / "run")


def test_random_rule_draws_anew_for_every_seed_of_the_run(verses, tmp_path):
    job = _job(verses, variants={"angular": {}, "shallow": {"stages.cut.rule": "random"}}, seeds=list(range(6)))
    run_job(job, tmp_path / "run")
    removed = {
        tuple(e["removed"])
        for e in _events(tmp_path / "run")
        if e["event"] == "stage-finished" and e["variant"] == "shallow" and e["stage"] == "cut"
    }
    assert len(removed) > 1


def test_finished_run_resumes_to_the_same_receipt_without_computing(verses, tmp_path):
    run_job(_job(verses), tmp_path / "run")
    before = json.loads((tmp_path / "run" / "receipt.json").read_text())
    count = len(_events(tmp_path / "run"))
    resume_run(tmp_path / "run")
    assert all(e.get("reused", True) for e in _events(tmp_path / "run")[count:])
    assert json.loads((tmp_path / "run" / "receipt.json").read_text()) == before


def test_without_a_cache_results_stay_in_the_run_folder(verses, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERWISE_CACHE", "off")
    run_job(_job(verses, seeds=[0]), tmp_path / "run")
    assert (tmp_path / "run" / ".cache" / "stages").is_dir()
    resume_run(tmp_path / "run")


def test_divergence_stops_the_run_or_is_recorded(verses, tmp_path):
    wild = {"stages.pretrain.optimizer": {"name": "sgd", "lr": 1.0e6}, "stages.pretrain.clip": None, "stages.pretrain.steps": 40}
    with pytest.raises(Diverged, match="Lower the learning rate"):
        run_job(_job(verses, variants={"angular": wild, "shallow": {}}), tmp_path / "stop")
    assert _events(tmp_path / "stop")[-1]["event"] == "stage-failed"
    receipt = run_job(_job(verses, variants={"angular": wild, "shallow": {}}, on_divergence="record"), tmp_path / "record")
    assert receipt.variants["angular"].diverged == [0, 1, 2] and receipt.variants["angular"].mean is None
    assert receipt.verdict == "fails" and any("diverged" in note for note in receipt.notes)
    assert (tmp_path / "record" / "report.html").is_file()


def test_images_run_through_the_same_jobs(tmp_path):
    job = read_job(
        {
            "name": "pictures",
            "data": {"source": "builtin:digits", "augment": {"crop": 1, "rotate": 10}},
            "model": {"preset": "resnet", "stack": {"layers": [{"channels": 8}, {"kind": "residual", "channels": 8}, {"kind": "residual", "channels": 16, "stride": 2, "norm": "group"}]}},
            "stages": {
                "fit": {"train": "classification", "epochs": 3, "batch": 32, "optimizer": {"lr": 0.01}, "policies": [{"name": "rotation"}]},
                "measure": {"evaluate": "classification", "splits": ["validation", "test", "train"]},
            },
        }
    )  # fmt: skip
    receipt = run_job(job, tmp_path / "run")
    measured = {name: values["0"] for name, values in receipt.metrics["default"].items()}
    assert measured["measure.accuracy"] == measured["measure.validation_accuracy"] > 0.2
    assert measured["measure.error_rate"] == pytest.approx(1 - measured["measure.accuracy"])
    assert 0 < measured["fit.rotation_min"] < 1


def test_tensorboard_gets_what_the_metrics_file_gets(verses, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_job(_job(verses, trackers=["tensorboard"], seeds=[0]), tmp_path / "run")
    (folder,) = {p.parent for p in (tmp_path / "run" / "trackers" / "angular").rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = {e.step: e.value for e in events.Scalars("loss")}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged == pytest.approx({line["step"]: line["loss"] for line in lines if line["variant"] == "angular"}, rel=1e-5)


def test_reused_curves_stand_once_however_often_a_run_is_resumed(verses, tmp_path):
    run_job(_job(verses, seeds=[5]), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    for _ in range(2):
        resume_run(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_several_exports_of_a_variant_have_folders_of_their_own(verses, tmp_path):
    stages = {"before": {"export": "hf"}, "cut": {"edit": "drop-layers", "count": 1, "samples": 8}, "after": {"export": "layerwise"}}
    run_job(_job(verses, stages=stages, claim=None, variants={"one": {}}, seeds=[0]), tmp_path / "run")
    place = tmp_path / "run" / "exports" / "one" / "seed-0"
    assert [load_any(place / name).spec.stack.depth for name in ("before", "after")] == [3, 2]
