"""Faults of machines and people, each with real files and, where one dies, a real process. The table is docs/reliability.md.

The same short job runs under all of them; whatever happened, after `resume` it ends in the bits of a run left in peace.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from layerwise import files
from layerwise.cli import app
from layerwise.files import check_folder, sha256
from layerwise.jobs.console import Progression
from layerwise.jobs.journal import claimed, read_lines
from layerwise.train import checkpoint

JOB: dict[str, Any] = {
    "name": "faults",
    "data": {"length": 32, "tokenizer": {"kind": "bytes"}},
    "model": {"preset": "decoder", "stack": {"depth": 2, "width": 32, "layer": {"heads": 2, "dropout": 0.1}}},
    "stages": {
        "fit": {"train": "causal-lm", "steps": 24, "batch": 4, "checkpoint_every": 5, "log_every": 100},
        "measure": {"evaluate": "language-modeling", "batches_at_most": 1},
    },
}


class Crash(BaseException):
    """The end of a process, as far as the program can tell: nothing catches it."""


@pytest.fixture(autouse=True)
def _results_stay_in_the_run(monkeypatch: pytest.MonkeyPatch, _own_cache: None) -> None:
    monkeypatch.setenv("LAYERWISE_CACHE", "off")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, verses: Path) -> Path:
    path = tmp_path_factory.mktemp("faults") / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | {"data": {**JOB["data"], "source": f"path:{verses}"}}))
    return path


@pytest.fixture(scope="module")
def peace(job: Path) -> str:
    """The weights of a run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERWISE_CACHE", "off")
        ended("run", job, "--out", job.parent / "peace")
    return weights(job.parent / "peace")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def ended(*arguments: object, code: int = 0) -> str:
    """What a command told before it ended with that exit code."""
    result = command(*arguments)
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def weights(run: Path) -> str:
    return sha256(run / "models" / "default" / "seed-0" / "model.safetensors")


def states(run: Path) -> list[Path]:
    """The checkpoints of a run that was stopped while it trained."""
    return sorted((run / "checkpoints").glob("*/*/fit-*/step-*"))


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Let something happen once, after that training step."""
    plain, pending = Progression.step, [act]

    def step(self: Progression, step: int, total: int, values: dict[str, float]) -> None:
        plain(self, step, total, values)
        if step == number and pending:
            pending.pop()()

    monkeypatch.setattr(Progression, "step", step)


def crashed(monkeypatch: pytest.MonkeyPatch, job: Path, run: Path, step: int = 17) -> list[Path]:
    """A run that died after a step; its checkpoints."""

    def crash() -> None:
        raise Crash

    with monkeypatch.context() as patch:
        at_step(patch, step, crash)
        with pytest.raises(Crash):
            command("run", job, "--out", run)
    return states(run)


def in_child(act: Callable[[], None]) -> int:
    """The exit code of a process that does something, or minus the number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(owner: Any, name: str, count: int, *, after: bool) -> None:
    """From the `count`-th call of a function on there is no process any more: kill -9, before the call or after it."""
    plain, calls = getattr(owner, name), [0]

    def killed(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = plain(*arguments, **options)
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, killed)


# The moments of the third checkpoint: its tensors are written, its first file is flushed, it gets its name, the oldest goes.
MOMENTS = {
    "before the tensors are written": (checkpoint, "save_tensors", 3, False),
    "after they are written": (checkpoint, "save_tensors", 3, True),
    "before the folder is flushed": (files, "_sync", None, False),
    "before it gets its name": (files, "_put_in_place", 3, False),
    "after it has its name": (files, "_put_in_place", 3, True),
    "before the oldest is removed": (checkpoint.shutil, "rmtree", None, False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_a_checkpoint_is_written(job: Path, peace: str, tmp_path: Path, moment: str) -> None:
    owner, name, count, after = MOMENTS[moment]
    run = tmp_path / "run"

    def act() -> None:
        if name == "rmtree":
            plain = shutil.rmtree
            shutil.rmtree = lambda path, **options: os.kill(os.getpid(), signal.SIGKILL) if Path(path).name == "step-000000005" else plain(path, **options)  # fmt: skip
        elif name == "_sync":
            plain_sync = files._sync
            files._sync = lambda path: os.kill(os.getpid(), signal.SIGKILL) if ".step-000000015." in str(path) else plain_sync(path)
        else:
            kill_at(owner, name, count, after=after)
        command("run", job, "--out", run, "--quiet")

    assert in_child(act) == -signal.SIGKILL
    for path in states(run):
        check_folder(path)
    assert "step-000000010" in {p.name for p in states(run)}
    ended("resume", run, "--quiet")
    assert weights(run) == peace
    assert not list(run.rglob(".*.new-*")), "what the killed process left unfinished stays"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_an_older_folder_is_replaced(tmp_path: Path, moment: str) -> None:
    def made(text: str) -> None:
        with files.whole_folder(tmp_path / "model") as folder:
            (folder / "a").write_text(text)

    def act() -> None:
        kill_at(files, "_exchange", 1, after=moment == "after")
        made("new")

    made("old")
    assert in_child(act) == -signal.SIGKILL
    check_folder(tmp_path / "model")
    assert (tmp_path / "model" / "a").read_text() == ("old" if moment == "before" else "new")
    made("newest")
    assert [p.name for p in tmp_path.iterdir()] == ["model"], "what the killed process left is swept"


def test_a_living_process_keeps_its_unfinished_folder(tmp_path: Path) -> None:
    with files.whole_folder(tmp_path / "one") as one:
        (one / "a").write_text("a")
        with files.whole_folder(tmp_path / "two") as two:
            (two / "b").write_text("b")
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two"}


def _fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))


def test_full_disk(job: Path, peace: str, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = disk / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 12, lambda: _fill(disk))
        told = ended("run", job, "--out", run, code=1)
    assert told.count("failed: ") == 1 and "No space left on device" in told
    assert "the checkpoint of step 15 could not be written" in told and "step-000000010 before it is whole" in told
    assert states(run)[-1].name == "step-000000010"
    check_folder(states(run)[-1])
    (disk / "ballast").unlink()
    assert "continuing from step 10 of 24" in ended("resume", run)
    assert weights(run) == peace


def test_disk_that_fills_up_between_checkpoints(job: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = disk / "run"
    settings = [f"--set=stages.fit.{key}" for key in ("steps=150", "log_every=1", "checkpoint_every=1000")]
    with monkeypatch.context() as patch:
        at_step(patch, 12, lambda: _fill(disk))
        told = ended("run", job, "--out", run, *settings, code=1)
    assert f"No space left on device: '{run / 'metrics.jsonl'}'" in told and f"'layerwise resume {run}' goes on" in told
    (disk / "ballast").unlink()
    ended("resume", run)
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    assert set(range(1, 151)) <= set(steps), "a line cut short spoils no other"


def test_a_limit_on_the_size_of_files(job: Path, peace: str, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        result = command("run", job, "--out", run)
        log.write_text(f"{result.exit_code} {result.output}"[:50_000])

    assert in_child(act) == 0
    told = log.read_text()
    assert told.startswith("1 ") and "the checkpoint of step 5 could not be written" in told and "File too large" in told
    assert "there is none before it" in told and "Traceback" not in told
    ended("resume", run)
    assert weights(run) == peace


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut short": lambda f: (f / "state.safetensors").write_bytes((f / "state.safetensors").read_bytes()[:-100]),
    "a flipped bit": lambda f: _flip(f / "state.safetensors"),
    "a flipped bit beside": lambda f: _flip(f / "meta.json"),
    "empty": lambda f: (f / "state.safetensors").write_bytes(b""),
    "a lost file": lambda f: (f / "meta.json").unlink(),
    "lost checksums": lambda f: (f / "checksums.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint(job: Path, peace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    run = tmp_path / "run"
    older, newer = crashed(monkeypatch, job, run)
    assert (older.name, newer.name) == ("step-000000010", "step-000000015")
    DAMAGE[damage](newer)
    told = ended("resume", run)
    assert f"{newer} is" in told and "going back to the checkpoint before it, step-000000010" in told
    assert "continuing from step 10 of 24" in told
    remarks = [line["message"] for line in read_lines(run / "events.jsonl") if line["event"] == "remark"]
    assert any("going back" in remark for remark in remarks), "the journal keeps it too"
    assert weights(run) == peace


def test_all_checkpoints_damaged(job: Path, peace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    for path in crashed(monkeypatch, job, run):
        _flip(path / "state.safetensors")
    told = ended("resume", run)
    assert "no other is left: starting anew" in told and "continuing" not in told
    assert weights(run) == peace


def test_changed_job_file(job: Path, peace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    kept = crashed(monkeypatch, job, run)
    text = (run / "job.yaml").read_text()
    (run / "job.yaml").write_text(text.replace("steps: 24", "steps: many"))
    assert "stages.fit.steps" in ended("resume", run, code=2)
    assert states(run) == kept, "a refusal costs nothing"
    (run / "job.yaml").write_text(text.replace("steps: 24", "steps: 8"))
    told = ended("resume", run)
    assert "job.yaml was changed: stages.fit.steps: 24 -> 8" in told and "it starts anew" in told
    assert weights(run) != peace and set(kept) <= set(states(run)), "the old stage's checkpoints are kept"
    (run / "job.yaml").write_text(text)
    told = ended("resume", run)
    assert "stages.fit.steps: 8 -> 24" in told and "continuing from step 15 of 24" in told
    assert weights(run) == peace, "the model in the run folder is the one of the job as it is"


def test_two_processes_and_the_lock_of_a_dead_one(job: Path, peace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    crashed(monkeypatch, job, run)
    reader, writer = os.pipe()

    holder = os.fork()
    if holder == 0:
        with claimed(run):
            os.write(writer, b"x")
            time.sleep(600)
    os.read(reader, 1)
    try:
        told = ended("resume", run, code=2)
        assert f"another process is working in {run} ({holder} on " in told
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    ended("resume", run)
    assert weights(run) == peace


@pytest.mark.parametrize("jump", [-(10**9), 10**9], ids=["back", "forward"])
def test_a_clock_that_jumps(job: Path, peace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: int) -> None:
    import datetime

    real, jumps, plain = datetime.datetime, [0], time.time

    class Jumping(real):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            jumps[0] += 1
            return real.now(tz) + datetime.timedelta(seconds=jump * (jumps[0] % 2))

    run = tmp_path / "run"
    monkeypatch.setattr(datetime, "datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: plain() + jump)
    older, newer = crashed(monkeypatch, job, run)
    # Files written last look oldest.
    os.utime(older, (2e9, 2e9))
    os.utime(newer, (1, 1))
    assert "continuing from step 15 of 24" in ended("resume", run)
    assert weights(run) == peace
    receipt = json.loads((run / "receipt.json").read_text())
    assert 0 <= receipt["variants"]["default"]["seconds"] < 600
    elapsed = [line["elapsed"] for line in read_lines(run / "events.jsonl")]
    assert all(0 <= seconds < 600 for seconds in elapsed)
    from layerwise.report.read import read_run

    assert 0 <= (read_run(run).elapsed or 0) < 600


def test_read_only_folders(job: Path, peace: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = disk / "run"
    kept = crashed(monkeypatch, job, run)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert f"{run} cannot be written: Read-only file system" in ended("resume", run, code=2)
    assert f"{disk} cannot be written" in ended("run", job, "--out", disk / "new", code=2)
    monkeypatch.setenv("LAYERWISE_CACHE", str(disk / "cache"))
    told = ended("run", job, "--out", tmp_path / "elsewhere")
    assert "cannot be written (Read-only file system): results are kept in the run folder" in told
    assert weights(tmp_path / "elsewhere") == peace
    monkeypatch.setenv("LAYERWISE_CACHE", "off")
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert states(run) == kept
    ended("resume", run)
    assert weights(run) == peace


def test_data_missing_at_resume(peace: str, verses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(verses, tmp_path / "texts")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB | {"data": {**JOB["data"], "source": f"path:{tmp_path / 'texts'}"}}))
    run = tmp_path / "run"
    kept = crashed(monkeypatch, tmp_path / "job.yaml", run)
    (tmp_path / "texts").rename(tmp_path / "moved")
    assert f"there is no file or folder {tmp_path / 'texts'}" in ended("resume", run, code=2)
    assert states(run) == kept
    (tmp_path / "moved").rename(tmp_path / "texts")
    assert "continuing from step 15" in ended("resume", run)
    assert weights(run) == peace


def test_damaged_cache_entry(job: Path, peace: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended("run", job, "--out", run)
    (kept,) = (run / ".cache" / "stages").glob("*/model/model.safetensors")
    _flip(kept)
    told = ended("resume", run)
    assert "the content of model/model.safetensors does not match its checksum" in told and "made anew" in told
    assert weights(run) == peace
    _flip(run / "models" / "default" / "seed-0" / "model.safetensors")
    ended("resume", run)
    assert weights(run) == peace, "a damaged model of a run is replaced from the cache"


def test_damaged_model_and_export_are_not_read(job: Path, peace: str, tmp_path: Path) -> None:
    model = job.parent / "peace" / "models" / "default" / "seed-0"
    for to in ("layerwise", "hf"):
        ended("convert", model, tmp_path / to, "--to", to)
        _flip(tmp_path / to / "model.safetensors")
        told = ended("convert", tmp_path / to, tmp_path / "never", "--to", "hf", code=2)
        assert "the content of model.safetensors does not match its checksum" in told
        assert not (tmp_path / "never").exists()


def test_links_that_lead_out_of_a_run_folder(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    crashed(monkeypatch, job, run)
    (tmp_path / "precious").write_text("precious")
    (run / "events.jsonl").unlink()
    (run / "events.jsonl").symlink_to(tmp_path / "precious")
    assert "is a symbolic link; a run folder has none" in ended("resume", run, code=2)
    assert (tmp_path / "precious").read_text() == "precious"
