"""A real process killed at random moments, again and again, ends in the same bits as one left in peace."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from layerwise.files import sha256

KILLS = 10
JOB = {
    "name": "killed",
    "data": {"length": 32, "tokenizer": {"kind": "bytes"}},
    "model": {"preset": "decoder", "stack": {"depth": 2, "width": 32, "layer": {"heads": 2, "dropout": 0.1}}},
    "stages": {
        "first": {
            "train": "causal-lm", "steps": 250, "batch": 8, "checkpoint_every": 7,
            "policies": [{"name": "rotation", "every": 10}, {"name": "layer-dropout"}],
        },
        "cut": {"edit": "drop-layers", "layers": [0]},
        "second": {"train": "causal-lm", "steps": 150, "batch": 8, "checkpoint_every": 7},
        "measure": {"evaluate": "language-modeling", "batches_at_most": 2},
    },
}  # fmt: skip


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "layerwise.cli", *map(str, arguments), "--quiet"]


def _start(command: list[str], cache: Path) -> subprocess.Popen:
    environment = os.environ | {"LAYERWISE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def _weights(run: Path) -> str:
    return sha256(run / "models" / "default" / "seed-0" / "model.safetensors")


@pytest.fixture
def job(tmp_path: Path, verses: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | {"data": {**JOB["data"], "source": f"path:{verses}"}}))
    return path


@pytest.mark.slow
def test_killed_at_ten_random_moments(job: Path, tmp_path: Path):
    began = time.monotonic()
    peace = _start(_command("run", job, "--out", tmp_path / "peace"), tmp_path / "cache-a")
    assert peace.wait(300) == 0, peace.stderr.read()
    whole = time.monotonic() - began
    run, chance = tmp_path / "killed", random.Random(int(os.environ.get("LAYERWISE_KILL_SEED", time.time_ns())))
    steps = []
    for attempt in range(KILLS):
        command = _command("resume", run) if (run / "job.yaml").exists() else _command("run", job, "--out", run)
        process = _start(command, tmp_path / "cache-b")
        # Anywhere from before the imports are done to well into training.
        time.sleep(chance.uniform(0.05, 0.75) * whole)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode in (-signal.SIGKILL, 0), process.stderr.read()
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
        steps.append((attempt, len(lines)))
    last = _start(_command("resume", run), tmp_path / "cache-b")
    assert last.wait(300) == 0, last.stderr.read()
    assert _weights(run) == _weights(tmp_path / "peace"), steps
    ours, theirs = (json.loads((folder / "receipt.json").read_text())["metrics"] for folder in (run, tmp_path / "peace"))
    assert ours == theirs
    assert steps[-1][1] > 0, "no attempt reached training: the moments were not random enough"


@pytest.mark.slow
def test_ctrl_c_exits_130_and_leaves_a_resumable_run(job: Path, tmp_path: Path):
    run = tmp_path / "run"
    process = _start(_command("run", job, "--out", run, "--set", "stages.first.steps=4000"), tmp_path / "cache")
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert "resume" in process.stderr.read()
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1] == "run-stopped"
    assert list((run / "checkpoints").rglob("step-*/state.safetensors")), "the stop wrote a checkpoint"
    text = (run / "job.yaml").read_text()
    (run / "job.yaml").write_text(text.replace("steps: 4000", "steps: 60"))
    again = _start(_command("resume", run), tmp_path / "cache")
    assert again.wait(120) == 0, again.stderr.read()


@pytest.mark.slow
def test_two_processes_do_not_share_a_run_folder(job: Path, tmp_path: Path):
    run = tmp_path / "run"
    first = _start(_command("run", job, "--out", run, "--set", "stages.first.steps=4000"), tmp_path / "cache")
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        second = _start(_command("resume", run), tmp_path / "cache")
        assert second.wait(120) == 2
        assert "another process is working in" in second.stderr.read()
    finally:
        first.kill()
        first.wait()
