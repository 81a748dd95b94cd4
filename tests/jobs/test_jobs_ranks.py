"""A job under `torchrun`: two real processes (gloo), one run folder, one voice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
TRAIN = {"train": "causal-lm", "steps": 12, "batch": 4, "log_every": 2, "checkpoint_every": 5}
JOB = {
    "name": "tiny",
    "model": {"preset": "decoder", "stack": {"depth": 3, "width": 16, "layer": {"heads": 2}}},
    "stages": {
        "pretrain": TRAIN,
        "cut": {"edit": "drop-layers", "count": 1, "samples": 8},
        "heal": {"train": "causal-lm", "steps": 4, "batch": 4, "parallel": "fsdp"},
        "healed": {"evaluate": "language-modeling", "batches_at_most": 2},
    },
}  # fmt: skip


@pytest.fixture
def job(tmp_path: Path, verses: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | {"data": {"source": f"path:{verses}", "length": 32, "tokenizer": {"kind": "bytes"}}}))
    return path


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)


def _start(
    processes: int, *arguments: object, script: tuple[object, ...] = ("-m", "layerwise.cli"), launcher: tuple[str, ...] = TORCHRUN
) -> subprocess.Popen:
    launcher = launcher if processes > 1 else ()
    command = [sys.executable, *launcher, *map(str, (*script, *arguments))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LAYERWISE_CACHE": "off", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _done(process: subprocess.Popen) -> str:
    out, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return out + errors


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "models" / "default" / "seed-0" / "model.safetensors")


def test_a_whole_job_on_two_processes_is_the_job_on_one(job: Path, tmp_path: Path):
    """Started by accelerate, whose launcher is torchrun underneath; the other tests start torchrun itself."""
    together = _start(2, "run", job, "--out", tmp_path / "two", launcher=ACCELERATE)
    told = _done(together)
    _done(_start(1, "run", job, "--out", tmp_path / "one", "--quiet"))
    assert told.count("report: ") == 1 and told.count("healed (evaluate)") == 1
    events = [json.loads(line)["event"] for line in (tmp_path / "two" / "events.jsonl").read_text().splitlines()]
    assert events.count("stage-finished") == 4 and events[0] == "run-started" and events[-1] == "run-finished"
    one, two = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-4)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), "the logged loss is that of all rows"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_stopped_on_two_processes_and_resumed_on_one(job: Path, tmp_path: Path, parallel: str):
    run = tmp_path / "run"
    settings = ("--set", "stages.pretrain.steps=600", "--set", f"stages.pretrain.parallel={parallel}")
    process = _start(2, "run", job, "--out", run, *settings)
    until = time.monotonic() + 120
    while not list(run.glob("checkpoints/**/step-*")) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=90)
    assert process.returncode != 0
    assert told.count("stopped; go on with") == 1, told
    assert json.loads((run / "events.jsonl").read_text().splitlines()[-1])["event"] == "run-stopped"
    files = {p.name for p in run.glob("checkpoints/**/state*.safetensors")}
    assert files == ({"state-00000-of-00002.safetensors"} | ({"state-00001-of-00002.safetensors"} if parallel == "fsdp" else set()))
    assert "continuing from step" in _done(_start(1, "resume", run))
    assert (run / "receipt.json").is_file()


def test_a_bad_job_is_told_once_and_writes_nothing(job: Path, tmp_path: Path):
    process = _start(2, "run", job, "--out", tmp_path / "run", "--set", "stages.cut.count=9")
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0 and told.count("error: stages.cut:") == 1
    assert not (tmp_path / "run").exists()


def _workers(launcher: subprocess.Popen) -> dict[str, int]:
    """The processes that `torchrun` started: rank -> process."""
    found = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        variables = dict(pair.partition("=")[::2] for pair in Path(f"/proc/{child}/environ").read_text().split("\0"))
        found[variables["RANK"]] = int(child)
    return found


def _goes_on(run: Path, told: str) -> str:
    """After one of two ranks was killed: it was told once, and one process finishes the run."""
    assert told.count("another process of this run ended") + told.count("the leading process of this run ended") == 1, told
    assert "Traceback" not in told.split("torch/distributed")[0], told
    assert not (run / "receipt.json").exists()
    resumed = _done(_start(1, "resume", run))
    assert (run / "receipt.json").is_file() and not list(run.glob("**/.*.new-*")) and not list(run.glob("**/.parts-*"))
    return resumed


@pytest.mark.parametrize("victim", ["0", "1"])
def test_one_of_two_ranks_is_killed_and_one_process_goes_on(job: Path, tmp_path: Path, victim: str):
    run = tmp_path / "run"
    process = _start(2, "run", job, "--out", run, "--quiet", "--set", "stages.pretrain.steps=300")
    until = time.monotonic() + 120
    while not list(run.glob("checkpoints/**/step-*")) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(_workers(process)[victim], signal.SIGKILL)
    _, told = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "continuing from step" in _goes_on(run, told)


@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_rank_is_killed_while_it_writes_its_rows_of_a_checkpoint(job: Path, tmp_path: Path, victim: str):
    """Sharded and in the background: the checkpoint before is used, what was half written is swept."""
    run, script = tmp_path / "run", Path(__file__).with_name("killed_while_writing.py")
    settings = ("--quiet", "--set", "stages.pretrain.parallel=fsdp", "--set", "stages.pretrain.steps=60")
    process = _start(2, "run", job, "--out", run, *settings, script=(script, victim))
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0
    assert [path.name for path in run.glob("checkpoints/**/step-*")] == ["step-000000005"]
    assert "continuing from step 5 of 60" in _goes_on(run, told)
