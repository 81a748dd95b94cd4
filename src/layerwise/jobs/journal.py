"""The line-by-line files of a run folder: events and metrics. Appended as things happen, readable after any crash."""

from __future__ import annotations

import datetime
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerwise.errors import BadInput

LOCK = ".lock"


class Journal:
    """Writer (and reader) of `events.jsonl` and `metrics.jsonl`.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.began = time.monotonic()
        for name in ("events.jsonl", "metrics.jsonl"):
            _end_torn_line(run / name)

    def event(self, event: str, **values: Any) -> None:
        """One line: the time of day, for people, and the seconds since this process began, which never jump."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        elapsed = round(time.monotonic() - self.began, 3)
        self._append("events.jsonl", {"time": now, "elapsed": elapsed, "event": event, **values})

    def metrics(self, variant: str, seed: int, stage: str, values: dict[str, Any]) -> None:
        """One line of training values; what is not finite is left out (JSON has no NaN)."""
        finite = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        self._append("metrics.jsonl", {"variant": variant, "seed": seed, "stage": stage, **finite})

    def curve(self, variant: str, seed: int, stage: str) -> list[dict[str, Any]]:
        """The metrics of one training stage by step; of lines written twice (after a resume) the later one."""
        lines: dict[int, dict[str, Any]] = {}
        for line in read_lines(self.run / "metrics.jsonl"):
            if (line.get("variant"), line.get("seed"), line.get("stage")) == (variant, seed, stage):
                lines[line["step"]] = {k: v for k, v in line.items() if k not in ("variant", "seed", "stage")}
        return [lines[step] for step in sorted(lines)]

    def _append(self, name: str, value: dict[str, Any]) -> None:
        path = self.run / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(value, allow_nan=False, default=str) + "\n")
        except OSError as error:
            error.filename = str(path)  # a full disk does not say for which file
            raise


class Silent(Journal):
    """The journal of a process that does not lead: nothing is written."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def event(self, event: str, **values: Any) -> None: ...
    def metrics(self, variant: str, seed: int, stage: str, values: dict[str, Any]) -> None: ...


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a jsonl file; a line cut short by a crash is passed over."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def _end_torn_line(path: Path) -> None:
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """The run folder for this process alone. The lock is the system's, so that of a process that died is open at once.

    Raises:
        BadInput: another process is working in it (named), or the folder cannot be written.
    """
    try:
        lock = os.fdopen(os.open(run / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
    except OSError as error:
        raise BadInput(f"{run} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = lock.read(80).strip()
            raise BadInput(
                f"another process is working in {run}{f' ({who})' if who else ''}: wait for it, or choose another folder with --out"
            ) from error
        except OSError as error:
            raise BadInput(f"{run} cannot be locked ({error.strerror}): choose a folder on a file system that has locks") from error
        lock.truncate()
        lock.write(f"{os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield
