"""Every command on a tiny model, from the training of it to its conversion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from layerwise.cli import app
from layerwise.jobs.catalogue import names
from layerwise.jobs.journal import read_lines
from layerwise.jobs.schema import read_job

PROSE = "\n\n".join(
    f"The {a} {v} the {b} on day {i}, and nobody {w} why the {b} had let it." * 6
    for i, (a, v, b, w) in enumerate(
        (a, v, b, w) for a in ("fox", "crow", "tide") for v in ("meets", "leaves") for b in ("wall", "hill") for w in ("asks", "knows")
    )
)
FIT = {"train": "causal-lm", "steps": 4, "batch": 4, "log_every": 1, "val_every": 2, "val_batches": 1, "optimizer": {"lr": 3e-3}}
STAGES: dict[str, Any] = {
    "fit": FIT,
    "look": {"analyze": "inspect", "samples": 4},
    "cut": {"edit": "drop-layers", "count": 1, "samples": 4},
    "measure": {"evaluate": "language-modeling", "batches_at_most": 2},
    "say": {"generate": ["The fox"], "new": 4},
    "write": {"export": "hf"},
}


def cli(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that went through every kind of stage, with the cache it filled beside it."""
    root = tmp_path_factory.mktemp("cli")
    (root / "prose.txt").write_text(PROSE)
    job = {
        "name": "tiny",
        "data": {"source": f"path:{root / 'prose.txt'}", "length": 24, "tokenizer": {"kind": "bytes"}},
        "model": {"preset": "decoder", "stack": {"depth": 3, "width": 16, "layer": {"heads": 2}}},
        "stages": STAGES,
        "variants": {"turned": {}, "deepest": {"stages.cut.rule": "shallowest"}},
        "claim": {"text": "t", "metric": "measure.val_loss", "direction": "lower", "method": "turned", "baseline": "deepest"},
        "seeds": [0, 1],
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERWISE_CACHE", str(root / "cache"))
        cli("run", root / "tiny.yaml", "--out", root / "run", "--quiet")
    yield root / "run"


@pytest.fixture(autouse=True)
def _same_cache(finished: Path, monkeypatch: pytest.MonkeyPatch, _own_cache: None) -> None:
    monkeypatch.setenv("LAYERWISE_CACHE", str(finished.parent / "cache"))


@pytest.fixture(scope="module")
def trained(finished: Path) -> Path:
    return finished / "models" / "turned" / "seed-0"


@pytest.mark.smoke
def test_run_leaves_everything_it_promises(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} >= {"job.yaml", "events.jsonl", "metrics.jsonl", "receipt.json", "report.html", "models"}
    receipt = json.loads((finished / "receipt.json").read_text())
    assert receipt["system"] == "tiny" and receipt["verdict"] in ("holds", "fails", "inconclusive")
    assert set(receipt["variants"]) == {"turned", "deepest"}
    for name, arm in receipt["variants"].items():
        assert arm["values"] == receipt["metrics"][name]["measure.val_loss"] and set(arm["values"]) == {"0", "1"}
    for variant in receipt["variants"]:
        for seed in (0, 1):
            assert (finished / "models" / variant / f"seed-{seed}" / "model.safetensors").is_file()
            assert (finished / "exports" / variant / f"seed-{seed}" / "config.json").is_file()


def test_run_keeps_a_job_file_that_reads_as_the_same_job(finished: Path) -> None:
    kept = yaml.safe_load((finished / "job.yaml").read_text())
    assert kept.pop("run")["device"] == "cpu"
    assert read_job(kept).plans() == read_job(finished.parent / "tiny.yaml").plans()


def test_events_tell_every_stage_once_and_the_base_is_trained_once_a_seed(finished: Path) -> None:
    lines = list(read_lines(finished / "events.jsonl"))
    assert lines[0]["event"] == "run-started"
    ends = [line for line in lines if line["event"] == "stage-finished"]
    fits = [line for line in ends if line["stage"] == "fit"]
    assert [(line["variant"], line["seed"], line["reused"]) for line in fits] == [
        ("turned", 0, False), ("deepest", 0, True), ("turned", 1, False), ("deepest", 1, True),
    ]  # fmt: skip
    assert len(ends) == len(STAGES) * 4
    cut = next(line for line in ends if line["stage"] == "cut")
    assert cut["before"]["params"] > cut["after"]["params"] and len(cut["removed"]) == 1
    assert (cut["before"]["layers"], cut["after"]["layers"]) == (3, 2)


def test_events_count_a_single_layer_as_one(finished: Path, tmp_path: Path) -> None:
    cli(
        "run", finished.parent / "tiny.yaml", "--out", tmp_path / "run", "--quiet", "--seeds", "0", "--variant", "turned",
        "--set", "stages.cut.count=2", "--set", "stages.write=null", "--set", "stages.say=null",
    )  # fmt: skip
    cut = next(line for line in read_lines(tmp_path / "run" / "events.jsonl") if "removed" in line)
    assert (cut["before"]["layers"], cut["after"]["layers"]) == (3, 1)


def test_metrics_have_every_step_of_every_arm(finished: Path) -> None:
    lines = list(read_lines(finished / "metrics.jsonl"))
    for variant in ("turned", "deepest"):
        for seed in (0, 1):
            mine = [line for line in lines if (line["variant"], line["seed"], line["stage"]) == (variant, seed, "fit")]
            assert sorted({line["step"] for line in mine if "loss" in line}) == [1, 2, 3, 4]


def test_resume_of_a_finished_run_reuses_everything_and_concludes_the_same(finished: Path) -> None:
    before = json.loads((finished / "receipt.json").read_text())
    count = len(list(read_lines(finished / "events.jsonl")))
    cli("resume", finished, "--quiet")
    after = json.loads((finished / "receipt.json").read_text())
    new = list(read_lines(finished / "events.jsonl"))[count:]
    assert new[0]["event"] == "run-resumed"
    assert all(line["reused"] for line in new if line["event"] == "stage-finished" and line["kind"] != "export")
    # The export stage runs anew; what it cost may differ.
    for arm in (*before["variants"].values(), *after["variants"].values()):
        assert arm.pop("seconds") >= 0 and arm.pop("peak_bytes") >= 0
    assert before == after


def test_resume_without_quiet_says_what_is_reused(finished: Path) -> None:
    assert "reused" in cli("resume", finished).output


def test_run_again_into_the_same_folder_is_refused(finished: Path) -> None:
    told = cli("run", finished.parent / "tiny.yaml", "--out", finished, code=2).stderr
    assert "layerwise resume" in told


def test_run_with_options_changes_what_they_say(finished: Path, tmp_path: Path) -> None:
    cli(
        "run", finished.parent / "tiny.yaml", "--out", tmp_path / "run", "--quiet", "--seeds", "0", "--variant", "turned",
        "--set", "stages.write=null", "--set", "stages.say=null", "--set", "stages.fit.steps=2", "--scale", "smoke",
    )  # fmt: skip
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    assert set(receipt["variants"]) == {"turned"} and receipt["claim"] is None and receipt["scale"] == "smoke"
    assert set(receipt["metrics"]["turned"]["measure.val_loss"]) == {"0"}
    assert max(line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_run_without_out_makes_a_new_numbered_folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("run", finished.parent / "tiny.yaml", "--quiet", "--seeds", "0")
    cli(*arguments)
    cli(*arguments)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_report_writes_the_page_anew_and_elsewhere(finished: Path, tmp_path: Path) -> None:
    (finished / "report.html").unlink()
    cli("report", finished)
    assert "<html" in (finished / "report.html").read_text()[:200].lower()
    cli("report", finished, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file()


def test_list_prints_every_system_and_json_is_pure() -> None:
    entries = json.loads(cli("list", "--json").stdout)
    assert [e["name"] for e in entries] == names()
    table = cli("list").stdout
    assert all(name in table for name in names())


def test_show_prints_a_job_that_reads_back(tmp_path: Path) -> None:
    text = cli("show", "mix-ln", "--scale", "smoke", "--set", "stages.pretrain.steps=7").stdout
    shown = read_job(yaml.safe_load(text))
    assert shown.plans() == read_job_at_smoke(7)
    assert shown.scale == "smoke"


def read_job_at_smoke(steps: int) -> Any:
    from layerwise.jobs.catalogue import find

    return read_job(find("mix-ln"), scale="smoke", settings={"stages.pretrain.steps": steps}).plans()


def test_inspect_has_a_row_a_layer(trained: Path, finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = cli(
        "inspect", trained, "--json", "--data", f"path:{finished.parent / 'prose.txt'}", "--samples", 4, "--length", 16, "--out", page
    )
    found = json.loads(result.stdout)
    assert [row[0] for row in found["tables"][0]["rows"]] == ["embedding", 0, 1, "head"]
    assert page.is_file()
    assert (
        "page:"
        in cli("inspect", trained, "--data", f"path:{finished.parent / 'prose.txt'}", "--samples", 4, "--length", 16, "--out", page).stdout
    )


def test_inspect_of_a_run_with_many_models_asks_which(finished: Path) -> None:
    told = cli("inspect", finished, code=2).stderr
    assert "4 models" in told and "turned/seed-0" in told


def test_generate_continues_the_prompt_and_repeats_itself(trained: Path) -> None:
    first = cli("generate", trained, "The fox", "--new", 6).stdout
    assert first.startswith("The fox")
    assert first == cli("generate", trained, "The fox", "--new", 6).stdout
    warm = [cli("generate", trained, "The fox", "--new", 12, "--temperature", 2.0, "--seed", s).stdout for s in (0, 0, 1)]
    assert warm[0] == warm[1] != warm[2]


def test_generate_agrees_with_the_stage_that_generated(finished: Path, trained: Path) -> None:
    said = [line for line in read_lines(finished / "events.jsonl") if line["event"] == "stage-finished" and line["stage"] == "say"]
    prompt, text = said[0]["findings"]["tables"][0]["rows"][0]
    assert (said[0]["variant"], said[0]["seed"]) == ("turned", 0)
    assert cli("generate", trained, prompt, "--new", 4).stdout == f"{prompt}{text}\n"


def test_generate_along_a_path_of_layers(trained: Path) -> None:
    assert cli("generate", trained, "The fox", "--new", 2, "--path", "0,0").stdout.startswith("The fox")
    assert "layer" in cli("generate", trained, "The fox", "--path", "0,5", code=2).stderr
    assert "empty" in cli("generate", trained, "", code=2).stderr


def test_converting_there_and_back_keeps_every_tensor(trained: Path, tmp_path: Path) -> None:
    cli("convert", trained, tmp_path / "hf", "--to", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "llama"
    cli("convert", tmp_path / "hf", tmp_path / "back", "--to", "layerwise")
    old, new = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "back"))
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert torch.equal(tensor, new[name]), name
    assert cli("generate", tmp_path / "back", "The fox", "--new", 6).stdout == cli("generate", trained, "The fox", "--new", 6).stdout


def test_convert_casts_and_never_overwrites(trained: Path, tmp_path: Path) -> None:
    cli("convert", trained, tmp_path / "half", "--to", "layerwise", "--dtype", "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert "exists already" in cli("convert", trained, tmp_path / "half", code=2).stderr


def test_exported_folder_is_what_convert_makes(finished: Path, trained: Path, tmp_path: Path) -> None:
    cli("convert", trained, tmp_path / "hf")
    exported = load_file(finished / "exports" / "turned" / "seed-0" / "model.safetensors")
    converted = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == converted.keys()
    assert all(torch.equal(exported[name], converted[name]) for name in exported)


def test_damaged_model_is_told_and_not_loaded(trained: Path, tmp_path: Path) -> None:
    cli("convert", trained, tmp_path / "copy", "--to", "layerwise")
    file = tmp_path / "copy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    told = cli("generate", tmp_path / "copy", "The fox", code=2).stderr
    assert "damaged" in told and "model.safetensors" in told


def test_job_may_start_from_a_trained_model(trained: Path, finished: Path, tmp_path: Path) -> None:
    cli("convert", trained, tmp_path / "base", "--to", "layerwise")
    job = {
        "name": "from-base",
        "data": {
            "source": f"path:{finished.parent / 'prose.txt'}",
            "length": 24,
            "tokenizer": {"kind": "file", "path": str(tmp_path / "base")},
        },
        "model": {"load": str(tmp_path / "base")},
        "stages": {"measure": STAGES["measure"]},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    cli("run", tmp_path / "job.yaml", "--out", tmp_path / "run", "--quiet")
    mine = json.loads((tmp_path / "run" / "receipt.json").read_text())["metrics"]["default"]["measure.val_loss"]["0"]
    theirs = json.loads((finished / "receipt.json").read_text())["metrics"]["turned"]["measure.val_loss"]["0"]
    assert mine == pytest.approx(theirs, rel=1e-6)


def test_claimed_metric_that_no_stage_measured_is_told(finished: Path, tmp_path: Path) -> None:
    result = cli(
        "run", finished.parent / "tiny.yaml", "--out", tmp_path / "run", "--quiet", "--set", "claim.metric=measure.accuracy", code=2
    )
    assert "claim.metric" in result.stderr and "measure.val_loss" in result.stderr


def test_doctor_says_what_is_here() -> None:
    told = cli("doctor").stdout
    for word in ("layerwise", "python", "torch", "threads", "devices", "cache"):
        assert word in told


def test_verify_exits_with_one_for_a_receipt_that_does_not_hold_together(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAYERWISE_RECEIPTS", str(tmp_path))
    receipt = json.loads((finished / "receipt.json").read_text())
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "demo.json").write_text(json.dumps(receipt))
    result = cli("verify", "demo", "--json", code=1)
    found = json.loads(result.stdout)
    assert found["ok"] is False and found["problems"]
    assert "NOT consistent" in cli("verify", "demo", code=1).stdout
    assert "no full receipt" in cli("verify", "demo", "--scale", "full", code=2).stderr


def test_help_of_every_command_is_there() -> None:
    told = cli("--help").stdout
    for command in ("list", "show", "run", "resume", "report", "inspect", "generate", "convert", "verify", "doctor"):
        assert command in told
        assert "Usage" in cli(command, "--help").stdout


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--json"], ["run", "--help"]])
def test_quick_commands_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from layerwise.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'scipy', 'transformers', 'datasets', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.returncode == 0, done.stderr


def test_ctrl_c_exits_with_130_and_the_run_goes_on_afterwards(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerwise.jobs import run

    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "cache"))
    real = run.run_stage

    def stopped(stage: Any, *arguments: Any, **options: Any) -> Any:
        if stage.name == "measure":
            raise KeyboardInterrupt
        return real(stage, *arguments, **options)

    arguments = ("run", finished.parent / "tiny.yaml", "--out", tmp_path / "run", "--quiet", "--variant", "turned", "--seeds", "0")
    monkeypatch.setattr(run, "run_stage", stopped)
    assert "layerwise resume" in cli(*arguments, code=130).stderr
    assert list(read_lines(tmp_path / "run" / "events.jsonl"))[-1]["event"] == "run-stopped"
    assert not (tmp_path / "run" / "receipt.json").exists()
    monkeypatch.setattr(run, "run_stage", real)
    cli("resume", tmp_path / "run", "--quiet")
    mine, theirs = (json.loads((folder / "receipt.json").read_text())["metrics"]["turned"] for folder in (tmp_path / "run", finished))
    assert {name: seeds["0"] for name, seeds in mine.items()} == {name: seeds["0"] for name, seeds in theirs.items()}
