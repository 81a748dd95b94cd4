"""`layerwise plan` on a tiny trained model: what it writes is true, runs as a job, and comes again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner, Result

from layerwise.cli import app

PROSE = "\n\n".join(
    f"On day {i} the fox meets the {w} by the {b}, and the {b} lets it pass." * 8
    for i in range(30)
    for w in ("crow", "tide")
    for b in ("wall", "hill")
)
FEW = {"drop": (True,), "heads": (0.5,), "ffn": (0.5, 0.25), "rank": (0.5, 0.25), "bits": (4, 2), "tokens": (8, 4, 2)}
FAST = ["--rows", "16", "--samples", "8", "--tries", "2", "--length", "24", "--quiet"]


def cli(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with some prose, a model trained on it as a Hugging Face checkpoint, and a plan for it."""
    root = tmp_path_factory.mktemp("plan")
    (root / "prose.txt").write_text(PROSE)
    layer = {"heads": 4, "kv_heads": 2, "ffn_width": 128}
    job = {
        "name": "tiny",
        "data": {"source": f"path:{root / 'prose.txt'}", "length": 24, "tokenizer": {"kind": "bytes"}},
        "model": {"preset": "decoder", "stack": {"depth": 4, "width": 32, "layer": layer}},
        "stages": {"fit": {"train": "causal-lm", "steps": 30, "batch": 8, "optimizer": {"lr": 1e-2}}, "write": {"export": "hf"}},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(job))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERWISE_CACHE", str(root / "cache"))
        patch.setattr("layerwise.jobs.planning.LEVELS", FEW)
        cli("run", root / "tiny.yaml", "--out", root / "run", "--quiet")
        (root / "hf").symlink_to(root / "run" / "exports" / "default" / "seed-0")
        cli(*_plan(root, "plan"), "--target-size", "0.6,0.3", "--apply", root / "made")
    yield root


@pytest.fixture(autouse=True)
def _same_cache(root: Path, monkeypatch: pytest.MonkeyPatch, _own_cache: None) -> None:
    monkeypatch.setenv("LAYERWISE_CACHE", str(root / "cache"))
    monkeypatch.setattr("layerwise.jobs.planning.LEVELS", FEW)


def _plan(root: Path, out: str) -> list[str | Path]:
    return ["plan", root / "hf", "--data", f"path:{root / 'prose.txt'}", *FAST, "--out", root / out]


def _read(root: Path, out: str = "plan") -> dict[str, Any]:
    return json.loads((root / out / "plan.json").read_text())


def test_every_target_has_a_job_and_all_methods_and_what_is_planned_fits(root: Path) -> None:
    found = _read(root)
    assert {p.name for p in (root / "plan").iterdir()} == {"plan.json", "plan.html", "plan-0.6.yaml", "plan-0.3.yaml"}
    assert [t["target"] for t in found["targets"]] == [0.6, 0.3]
    for target in found["targets"]:
        assert set(target["methods"]) == {"layers dropped", "width", "low rank", "bits per layer", "bits, uniform", "combination"}
        reached = [c for c in target["methods"].values() if c is not None]
        assert reached and all(c["bytes"] <= target["budget"] for c in reached)
        assert target["plan"]["loss"] == min(c["loss"] for c in reached)
        assert target["plan"]["held_out"] is not None and target["sentence"]
    front = [(c["bytes"], c["loss"]) for c in found["front"]]
    assert front == sorted(front) and [loss for _, loss in front] == sorted((loss for _, loss in front), reverse=True)
    assert not any(c["bytes"] <= b and c["loss"] < loss for b, loss in front for c in found["tried"])
    page = (root / "plan" / "plan.html").read_text()
    assert all(text in page for text in ("Size against loss", "bits per layer", found["targets"][1]["sentence"].split(",")[0]))


def test_sizes_are_those_of_the_checkpoints_on_disk(root: Path) -> None:
    found = _read(root)
    size = lambda folder: sum(t.numel() * t.element_size() for t in load_file(folder / "model.safetensors").values())  # noqa: E731
    assert found["bytes"] == size(root / "hf")
    assert found["targets"][0]["plan"]["bytes"] == size(root / "made")


def test_the_job_makes_the_model_that_was_measured(root: Path, tmp_path: Path) -> None:
    cli("run", root / "plan" / "plan-0.6.yaml", "--out", tmp_path / "run", "--quiet")
    ours, theirs = (load_file(f / "model.safetensors") for f in (root / "made", tmp_path / "run" / "models" / "default" / "seed-0"))
    assert ours.keys() == theirs.keys() and all(bool((ours[n] == theirs[n]).all()) for n in ours)
    assert (root / "made" / "tokenizer.json").is_file()


def test_it_comes_again(root: Path) -> None:
    cli(*_plan(root, "again"), "--target-size", "0.6,0.3")
    first, second = _read(root), _read(root, "again")
    assert first | {"environment": None} == second | {"environment": None}


def test_healed_plans_are_trained_before_they_are_rounded_and_their_job_does_the_same(root: Path, tmp_path: Path) -> None:
    cli(*_plan(root, "healed"), "--target-size", "0.3", "--heal", "2", "--apply", tmp_path / "made")
    found = _read(root, "healed")
    stages = list(yaml.safe_load((root / "healed" / "plan.yaml").read_text())["stages"])
    assert found["healed"] and stages[stages.index("widen") :][:3] == ["widen", "heal", "store"] and "as long" in " ".join(found["notes"])
    assert "quantize" not in stages or stages.index("quantize") > stages.index("store")
    cli("run", root / "healed" / "plan.yaml", "--out", tmp_path / "run", "--quiet")
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "made", tmp_path / "run" / "models" / "default" / "seed-0"))
    assert ours.keys() == theirs.keys() and all(bool((ours[n] == theirs[n]).all()) for n in ours)


def test_latency_is_measured_where_it_is_asked_for(root: Path, tmp_path: Path) -> None:
    told = cli(
        *_plan(root, "slow"),
        "--target-size",
        "0.6",
        "--target-latency",
        "10000",
        "--latency-of",
        "prefill",
        "--latency-length",
        "8",
        "--json",
    )
    found = json.loads(told.stdout)
    assert found["latency"] == {"phase": "prefill", "batch": 1, "length": 8} and found["ms"] > 0
    assert found["targets"][0]["plan"]["measured_ms"] > 0 and found["targets"][0]["target_ms"] == 10000
    told = cli(*_plan(root, "fast"), "--target-size", "0.6", "--target-latency", "0.000001", code=2)
    assert "no plan is so fast" in told.output and not (root / "fast").exists()


def test_a_checkpoint_of_transformers_of_another_family_is_planned_for(root: Path, tmp_path: Path) -> None:
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=262, n_embd=32, n_layer=3, n_head=4, n_positions=32))
    theirs.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "tokenizer.json").write_bytes((root / "hf" / "tokenizer.json").read_bytes())
    told = cli(
        "plan",
        tmp_path / "gpt2",
        "--data",
        f"path:{root / 'prose.txt'}",
        *FAST,
        "--target-size",
        "0.4",
        "--out",
        tmp_path / "p",
        "--apply",
        tmp_path / "made",
        "--json",
    )
    plan = json.loads(told.stdout)["targets"][0]["plan"]
    stored = load_file(tmp_path / "made" / "model.safetensors")
    assert plan["bytes"] == sum(t.numel() * t.element_size() for t in stored.values()) <= 0.4 * theirs.num_parameters() * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-size", "0.01"], "the smallest that a plan reaches is"),
        (["--target-size", "1.5"], "in (0, 1]"),
        (["--target-size", "half"], "takes a share"),
        (["--latency-of", "training", "--target-latency", "1"], "decode or prefill"),
        (["--data", "builtin:digits"], "reads text"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(root: Path, arguments: list[str], message: str) -> None:
    told = cli(*_plan(root, "none"), *arguments, code=2)
    assert message in told.output and not (root / "none").exists()


def test_models_and_folders_that_cannot_be_are_refused(root: Path, tmp_path: Path) -> None:
    assert "exists already" in cli(*_plan(root, "plan"), code=2).output
    assert "trained model" in cli("plan", "decoder", "--out", tmp_path / "p", code=2).output
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((root / "hf" / name).read_bytes())
    assert "no tokenizer.json" in cli("plan", bare, "--out", tmp_path / "p", code=2).output
    assert not (tmp_path / "p").exists()
