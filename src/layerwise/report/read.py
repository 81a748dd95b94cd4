"""A run folder as plain data. Whatever part of it exists is read: runs may be unfinished, stopped, failed or cut short."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from layerwise.errors import BadInput

State = Literal["finished", "stopped", "failed", "unfinished"]


@dataclass
class Finished:
    """One finished stage of one seed of one variant; `before`, `after` and `removed` are there when it changed the stack."""

    variant: str
    seed: str
    stage: str
    kind: str
    name: str
    seconds: float | None = None
    reused: bool = False
    findings: dict[str, Any] = field(default_factory=dict)
    before: dict[str, int] | None = None
    after: dict[str, int] | None = None
    removed: list[int] = field(default_factory=list)


@dataclass
class Run:
    """Everything a run folder says.

    Attributes:
        name: the job's name (the folder's when there is no job file).
        job: the resolved job; empty when it is missing. job_text: the same as YAML, without the machine's own settings.
        receipt: the result, if the run came that far.
        lines: lines of training values, each (variant, seed, stage, step) once.
        stages: finished stages in the order they first ended.
        state, message: how the run stands, and why it failed. elapsed: seconds that its processes worked.
        problems: what could not be read, in words.
    """

    name: str
    job: dict[str, Any] = field(default_factory=dict)
    job_text: str = ""
    receipt: dict[str, Any] | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    stages: list[Finished] = field(default_factory=list)
    state: State = "unfinished"
    message: str = ""
    elapsed: float | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def claim(self) -> dict[str, Any] | None:
        """What the job claims; the receipt's wording counts where there is one."""
        claim = (self.receipt or {}).get("claim") or self.job.get("claim")
        return claim if isinstance(claim, dict) else None

    @property
    def scale(self) -> str:
        return str((self.receipt or {}).get("scale") or self.job.get("scale") or "")

    @property
    def variants(self) -> list[str]:
        """In the job's order; what only the results know comes after."""
        named = [*_mapping(self.job.get("variants")), *_mapping((self.receipt or {}).get("variants"))]
        return list(dict.fromkeys(map(str, [*named, *(s.variant for s in self.stages), *(str(line["variant"]) for line in self.lines)])))

    @property
    def seeds(self) -> list[str]:
        given = self.job.get("seeds")
        named = given if isinstance(given, list) else []
        return list(dict.fromkeys(map(str, [*named, *(s.seed for s in self.stages), *(line["seed"] for line in self.lines)])))

    @property
    def stage_names(self) -> list[str]:
        named = [*_mapping(self.job.get("stages")), *(s.stage for s in self.stages), *(line["stage"] for line in self.lines)]
        return list(dict.fromkeys(map(str, named)))

    def planned(self) -> int:
        """How many stages the job has over all variants and seeds; 0 when it is not known."""
        total = 0
        for change in _mapping(self.job.get("variants")).values():
            names = {str(name) for name in _mapping(self.job.get("stages"))}
            for path, value in _mapping(change).items():
                parts = str(path).split(".")
                if parts == ["stages"]:
                    names |= {str(name) for name in _mapping(value)}
                elif parts[0] == "stages" and len(parts) == 2:
                    names = names - {parts[1]} if value is None else names | {parts[1]}
            total += len(names)
        return total * len(self.seeds)


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        BadInput: there is no such folder, or none of a run's files is in it.
    """
    files = ("job.yaml", "events.jsonl", "metrics.jsonl", "receipt.json")
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}")
    if not any((folder / name).is_file() for name in files):
        raise BadInput(f"{folder} holds no run (none of {', '.join(files)} is in it)")
    run = Run(folder.resolve().name)
    _read_job(folder / "job.yaml", run)
    run.receipt = _read_receipt(folder / "receipt.json", run)
    run.name = str(run.job.get("name") or (run.receipt or {}).get("system") or run.name)
    events = list(read_lines(folder / "events.jsonl", run))
    run.stages = _finished(events)
    run.state, run.message, run.elapsed = _state(events)
    if not events and run.receipt is not None:
        run.state = "finished"
    newest: dict[tuple[str, str, str, float], dict[str, Any]] = {}
    for line in read_lines(folder / "metrics.jsonl", run):
        if isinstance(line.get("step"), int | float):
            line = {**line, **{key: str(line.get(key, "")) for key in ("variant", "seed", "stage")}}
            newest[line["variant"], line["seed"], line["stage"], line["step"]] = line
    run.lines = list(newest.values())
    return run


def read_lines(path: Path, run: Run) -> Iterator[dict[str, Any]]:
    """The whole lines of a jsonl file, numbers that are not finite as None. A cut last line is normal; others are reported."""
    if not path.is_file():
        return
    bad: list[int] = []
    number = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                if text.strip():
                    bad.append(number)
                continue
            if isinstance(value, dict):
                yield finite(value)
    bad = [n for n in bad if n != number]
    if bad:
        run.problems.append(f"{path.name}: {len(bad)} {'line' if len(bad) == 1 else 'lines'} could not be read (first: line {bad[0]}).")


def finite(value: Any) -> Any:
    """Plain data with NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _read_job(path: Path, run: Run) -> None:
    if not path.is_file():
        run.problems.append("job.yaml is missing: the job's title, claim and settings are not shown.")
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        job = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        job = None
    if not isinstance(job, dict):
        run.problems.append("job.yaml could not be read: the job's title and claim are not shown.")
        run.job_text = text
        return
    job.pop("run", None)  # device and folders of the machine it ran on
    run.job = job
    run.job_text = yaml.safe_dump(job, sort_keys=False, allow_unicode=True, width=100)


def _read_receipt(path: Path, run: Run) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        receipt = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        receipt = None
    if not isinstance(receipt, dict):
        run.problems.append("receipt.json could not be read: the result is not shown.")
        return None
    return finite(receipt)


def _finished(events: list[dict[str, Any]]) -> list[Finished]:
    """The last word on every stage; a resumed run tells of reused stages again."""
    found: dict[tuple[str, str, str], Finished] = {}
    for event in events:
        if event.get("event") != "stage-finished":
            continue
        key = (str(event.get("variant", "")), str(event.get("seed", "")), str(event.get("stage", "")))
        found[key] = Finished(
            *key,
            kind=str(event.get("kind", "")),
            name=str(event.get("name") or ""),
            seconds=event.get("seconds"),
            reused=bool(event.get("reused")),
            findings=_mapping(event.get("findings")),
            before=event.get("before"),
            after=event.get("after"),
            removed=list(event.get("removed") or []),
        )
    return list(found.values())


def _state(events: list[dict[str, Any]]) -> tuple[State, str, float | None]:
    state: State = "unfinished"
    message = ""
    current: dict[str, Any] = {}
    for event in events:
        kind = event.get("event")
        if kind == "stage-started":
            current = event
        elif kind == "stage-finished":
            current = {}
        elif kind in ("run-started", "run-resumed"):
            state, message = "unfinished", ""
        elif kind == "run-finished":
            state, message = "finished", ""
        elif kind in ("run-stopped", "stage-failed"):
            place = event if event.get("stage") else current
            where = f"{place.get('variant')}, seed {place.get('seed')}, stage {place.get('stage')}" if place.get("stage") else ""
            state = "stopped" if kind == "run-stopped" else "failed"
            message = ": ".join(filter(None, (where, str(event.get("message") or ""))))
    times = [t for t in (_time(event.get("time")) for event in events) if t is not None]
    return state, message, _worked(events) if any("elapsed" in event for event in events) else times[-1] - times[0] if times else None


def _worked(events: list[dict[str, Any]]) -> float:
    """Seconds that the processes of a run worked, by their own steady clocks: the time of day may jump, and nobody works between two."""
    spans = [0.0]
    for event in events:
        if event.get("event") in ("run-started", "run-resumed"):
            spans.append(0.0)
        elapsed = event.get("elapsed")
        spans[-1] = max(spans[-1], float(elapsed) if isinstance(elapsed, int | float) else 0.0)
    return sum(spans)


def _time(value: Any) -> float | None:
    try:
        return datetime.datetime.fromisoformat(str(value)).timestamp()
    except ValueError:
        return None
