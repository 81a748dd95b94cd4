"""Running a job: every seed of every variant through its stages, into one run folder with a receipt and a report."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from layerwise.analyze.cost import size
from layerwise.data.load import Data, load_data
from layerwise.data.spec import DataSpec
from layerwise.errors import BadInput, Diverged, LayerwiseError
from layerwise.files import CHECKSUMS, check_folder, digest, sha256, whole_folder, write_file, write_json
from layerwise.jobs.cache import Result, StageCache, cache_folder, code_version
from layerwise.jobs.check import check_fits, check_job
from layerwise.jobs.console import Progression
from layerwise.jobs.difference import differences
from layerwise.jobs.fill import filled
from layerwise.jobs.journal import LOCK, Journal, Silent, claimed, read_lines
from layerwise.jobs.meter import metered
from layerwise.jobs.reach import final, reached
from layerwise.jobs.receipt import Receipt, Variant, make_receipt
from layerwise.jobs.references import START, contents, resolved
from layerwise.jobs.schema import Job, Plan, Stage, read_job
from layerwise.jobs.stages import run_stage
from layerwise.jobs.yamlfile import read_yaml
from layerwise.models.checkpoint import load, save
from layerwise.models.load import load_any
from layerwise.models.model import Model, build
from layerwise.models.spec import spec_data
from layerwise.report.page import write_report
from layerwise.train.loop import Listener
from layerwise.train.parallel import outline, outlined
from layerwise.train.ranks import Ranks, join
from layerwise.train.spec import TrainSpec


def run_job(
    job: Job,
    out: Path,
    *,
    data_dir: Path | None = None,
    device: str = "cpu",
    progression: Progression | None = None,
) -> Receipt:
    """Run a job into a new folder and return its receipt.

    With several processes (`torchrun`, `accelerate launch`) all of them call this; rank 0 owns the folder and does what is done
    once, and all train together.

    Raises:
        BadInput: the job cannot work, or `out` holds something already; nothing was written.
        LayerwiseError: a stage failed. KeyboardInterrupt: stopped; `resume_run(out)` goes on.
    """
    settings = {"device": device, "data_dir": str(data_dir.resolve()) if data_dir else None}
    here, device = join(device)
    plans = check_job(job, data_dir=data_dir, device=device)
    check_fits(plans)
    if not here.leads:
        return _follow(job, plans, data_dir, device, here)
    _check_new(out)
    out.mkdir(parents=True, exist_ok=True)
    with claimed(out):
        write_file(out / "job.yaml", yaml.safe_dump({**job.model_dump(mode="json"), "run": settings}, sort_keys=False, allow_unicode=True))
        here.share(str(out.resolve()))
        return _Runner(job, plans, out, data_dir, device, progression or Progression(), here).run("run-started")


def _follow(job: Job, plans: dict[str, Plan], data_dir: Path | None, device: str, here: Ranks) -> Receipt:
    """The part of a process that does not lead: it trains along, in the leader's folder, and says nothing."""
    return _Runner(job, plans, Path(here.share()), data_dir, device, Progression(quiet=True), here).run("run-followed")


def _check_new(out: Path) -> None:
    """Refuse a run folder that holds something or cannot be made."""
    standing = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not standing.is_dir():
        raise BadInput(f"{standing} is a file: choose a folder that is new or empty with --out")
    if not os.access(standing, os.W_OK):
        raise BadInput(f"{standing} cannot be written: choose another folder with --out")
    if standing == out and any(p.name != LOCK for p in out.iterdir()):
        what = "a run; go on with it by 'layerwise resume'" if (out / "job.yaml").is_file() else "files"
        raise BadInput(f"{out} holds {what}: choose a folder that is new or empty with --out")


def resume_run(run: Path, *, progression: Progression | None = None) -> Receipt:
    """Go on with a run that was stopped or killed: finished stages are reused, an unfinished one continues from its checkpoint.

    Raises:
        BadInput: the folder holds no run, or its job file was changed into one that cannot work.
    """
    if not (run / "job.yaml").is_file():
        raise BadInput(f"{run} holds no run (there is no job.yaml in it)")
    _refuse_links(run)
    raw = read_yaml(run / "job.yaml")
    settings = raw.pop("run", None) or {}
    if not isinstance(settings, dict):
        raise BadInput(f"{run / 'job.yaml'}: run: a mapping with device and data_dir is expected; got {str(settings)[:80]!r}")
    job = read_job(raw)
    data_dir = Path(str(settings["data_dir"])) if settings.get("data_dir") else None
    here, device = join(str(settings.get("device", "cpu")))
    plans = check_job(job, data_dir=data_dir, device=device)
    check_fits(plans)
    if not here.leads:
        return _follow(job, plans, data_dir, device, here)
    with claimed(run):
        here.share(str(run.resolve()))
        return _Runner(job, plans, run, data_dir, device, progression or Progression(), here).run("run-resumed")


def _refuse_links(run: Path) -> None:
    """Refuse a run folder with symbolic links: through one, a run that came from elsewhere would write outside its folder."""
    for path in sorted(run.rglob("*")):
        if path.is_symlink():
            raise BadInput(f"{path} is a symbolic link; a run folder has none: replace it by what it leads to")


@dataclass
class _Arm:
    """One seed of one variant on its way through the stages. The model is made or loaded only when a stage needs it."""

    key: str
    make: Callable[[], Model]
    models: dict[str, Path] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unreached: set[str] = field(default_factory=set)
    seconds: float = 0.0
    peak_bytes: int = 0
    params: int = 0


class _Listener(Listener):
    """Passes training's news on to the journal, the trackers and the person."""

    def __init__(self, runner: _Runner, variant: str, seed: int, stage: str) -> None:
        self.runner, self.labels = runner, (variant, seed, stage)
        self._trackers: list[Any] | None = None

    @property
    def trackers(self) -> list[Any]:
        """Opened when there is a first value: a stage that trains nothing leaves none behind."""
        if self._trackers is None:
            wanted = self.runner.job.trackers if self.runner.here.leads else []
            self._trackers = [_tracker(name, self.runner.out, "/".join(map(str, self.labels))) for name in wanted]
        return self._trackers

    def progress(self, step: int, total: int, values: dict[str, float]) -> None:
        self.runner.progression.step(step, total, values)

    def metrics(self, values: dict[str, float]) -> None:
        self.runner.journal.metrics(*self.labels, values)
        for tracker in self.trackers:
            tracker.log({k: v for k, v in values.items() if k != "step"}, step=int(values["step"]))

    def say(self, message: str) -> None:
        self.runner.journal.event("remark", message=message)
        self.runner._remark(message)

    def close(self) -> None:
        for tracker in self._trackers or []:
            tracker.finish()


class _Runner:
    def __init__(
        self, job: Job, plans: dict[str, Plan], out: Path, data_dir: Path | None, device: str, progression: Progression, here: Ranks
    ) -> None:
        self.job, self.plans, self.out, self.data_dir, self.device = job, plans, out, data_dir, device
        self.progression, self.here = progression, here
        self.journal = Journal(out) if here.leads else Silent(out)
        self.cache_root = cache_folder()
        self.cache = StageCache(self._writable_cache() or out / ".cache")
        self.data: dict[str, Data] = {}

    def run(self, event: str) -> Receipt:
        """Everything from the first stage to the report.

        Raises:
            LayerwiseError: a stage failed, or a file could not be written (no room); what was finished is kept.
        """
        try:
            return self._run(event)
        except KeyboardInterrupt:
            self.progression.end("")
            self._last_event("run-stopped")
            raise
        except BaseException as error:
            self.progression.end("")
            unforeseen = {} if isinstance(error, LayerwiseError | OSError) else {"trace": traceback.format_exc()}
            self._last_event("stage-failed", message=f"{type(error).__name__}: {error}", **unforeseen)
            if isinstance(error, OSError) and not isinstance(error, LayerwiseError):
                raise LayerwiseError(f"{error}; what was finished is kept, 'layerwise resume {self.out}' goes on") from error
            raise

    def _writable_cache(self) -> Path | None:
        """The cache, unless nothing could be kept in it, which is better known now than after hours of training."""
        if self.cache_root is not None:
            try:
                self.cache_root.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.cache_root).close()
            except OSError as error:
                self._remark(f"the cache {self.cache_root} cannot be written ({error.strerror}): results are kept in the run folder")
                return None
        return self.cache_root

    def _last_event(self, event: str, **values: Any) -> None:
        """The event that ends a run, if the disk still takes it."""
        with contextlib.suppress(OSError):
            self.journal.event(event, **values)

    def _say_changes(self, job: dict[str, Any]) -> None:
        """What was changed in the job file since it ran last."""
        before = [line["content"] for line in read_lines(self.out / "events.jsonl") if isinstance(line.get("content"), dict)]
        changes = differences(before[-1], job) if before else []
        if changes:
            self.progression.say(f"  job.yaml was changed: {'; '.join(changes[:8])}{'; ...' if len(changes) > 8 else ''}")

    def _run(self, event: str) -> Receipt:
        job = self.job
        content = job.model_dump(mode="json")
        if self.here.leads:
            self._say_changes(content)
        self.journal.event(event, job=job.name, scale=job.scale, content=content)
        variants = {name: Variant() for name in self.plans}
        metrics: dict[str, dict[str, dict[str, float]]] = {name: {} for name in self.plans}
        spent: dict[str, list[float]] = {name: [] for name in self.plans}
        for seed in job.seeds:
            arms: dict[str, _Arm] = {}
            for name, plan in self.plans.items():
                try:
                    arms[name] = self._arm(plan, seed)
                except Diverged as error:
                    if job.on_divergence == "stop":
                        raise
                    self.progression.end(f"  {error}")
                    variants[name].diverged.append(seed)
            self._reach(arms)
            for name, arm in arms.items():
                for metric, value in arm.metrics.items():
                    if "." in metric:
                        metrics[name].setdefault(metric, {})[str(seed)] = value
                if job.claim is not None and job.claim.metric in arm.unreached:
                    variants[name].unreached.append(seed)
                elif job.claim is not None:
                    variants[name].values[str(seed)] = self._claimed(arm, job.claim.metric, name)
                spent[name].append(arm.seconds)
                variants[name].params = arm.params
                variants[name].peak_bytes = max(variants[name].peak_bytes, arm.peak_bytes)
        if not self.here.leads:
            receipt = Receipt.model_validate(self.here.share())
            self.here.leave()
            return receipt
        for name, seconds in spent.items():
            variants[name].seconds = round(sum(seconds) / max(len(seconds), 1), 3)
        sources = {s["name"]: s for data in self.data.values() for s in data.sources}
        receipt = make_receipt(job, variants, metrics, list(sources.values()), self.device)
        write_json(self.out / "receipt.json", receipt.dump())
        self.journal.event("run-finished", verdict=receipt.verdict)
        write_report(self.out)
        self.here.share(receipt.dump())
        self.here.leave()
        return receipt

    def _reach(self, arms: dict[str, _Arm]) -> None:
        """Metrics that compare the arms of one seed, see `layerwise.jobs.reach`."""
        for name, wanted in self.job.reach.items():
            target: float | None
            if isinstance(wanted.target, str):
                target = final(arms[wanted.target].curves.get(wanted.stage, []), wanted.loss) if wanted.target in arms else None
            else:
                target = wanted.target
            if target is None:
                continue
            for arm in arms.values():
                if wanted.stage not in arm.curves:
                    continue
                cost = reached(arm.curves[wanted.stage], target, wanted.loss, wanted.cost)
                if cost is None:
                    arm.unreached |= {name, f"{wanted.stage}.{name}"}
                else:
                    arm.metrics |= {name: cost, f"{wanted.stage}.{name}": cost}

    def _claimed(self, arm: _Arm, metric: str, variant: str) -> float:
        if metric not in arm.metrics:
            raise BadInput(
                f"claim.metric: no stage of '{variant}' measured '{metric}'; measured: {', '.join(sorted(arm.metrics)) or 'nothing'}"
            )
        return arm.metrics[metric]

    def _arm(self, plan: Plan, seed: int) -> _Arm:
        data = self._data(plan.data)
        arm = self._start(plan, data, seed)
        for stage in plan.stages:
            data = self._data(stage.source or plan.data)
            probe = None if stage.probe is None else self._data(stage.probe)
            title = f"{plan.variant} seed {seed}: {stage.name}"
            looked_at = [] if probe is None else [probe.fingerprint]
            key = digest([arm.key, stage.data(), stage.name, seed, data.fingerprint, *looked_at, self._engine(), *contents(stage)])
            labels: dict[str, Any] = {"variant": plan.variant, "seed": seed, "stage": stage.name, "kind": stage.kind, "name": stage.what}
            result = self._found(key) if stage.kind != "export" else None
            reused = result is not None
            if result is None:
                self.journal.event("stage-started", **labels)
                result = self._execute(stage, arm, data, probe, seed, key, plan, title)
            else:
                self._replay(result.curve, plan.variant, seed, stage.name)
            if result.model is not None:
                arm.key, arm.make = key, partial(load, result.model, device=self.device)
                arm.models[stage.name] = result.model
            for metric, value in result.findings.get("metrics", {}).items():
                # The plain name is the latest stage's; `stage.metric` tells stages apart that measure the same.
                arm.metrics |= {metric: value, f"{stage.name}.{metric}": value}
            if result.curve:
                arm.curves[stage.name] = result.curve
            arm.seconds += result.seconds
            arm.peak_bytes = max(arm.peak_bytes, result.peak_bytes)
            arm.params = (result.after or {}).get("params", arm.params)
            extra = {k: v for k in ("before", "after", "removed") if (v := getattr(result, k)) is not None}
            self.journal.event(
                "stage-finished", **labels, reused=reused, seconds=round(result.seconds, 3), findings=result.findings, **extra
            )
            self.progression.end(f"  {title} ({stage.kind}){_spoken(result)}{'  reused' if reused else f'  {result.seconds:.1f} s'}")
        self._keep_model(plan, seed, arm)
        return arm

    def _found(self, key: str) -> Result | None:
        """The stage's result if it was kept. The leader looks, so that no two processes see different things."""

        def look() -> dict[str, Any] | None:
            found = self.cache.find(key, self._remark)
            return None if found is None else found.data()

        found = self.here.decided(look)
        return None if found is None else Result.of(found)

    def _remark(self, message: str) -> None:
        self.progression.say(f"  {message}")

    def _replay(self, curve: list[dict[str, Any]], variant: str, seed: int, stage: str) -> None:
        """The training values of a reused stage, to the journal and the trackers, as if it had run; nothing if they are there from before."""
        if curve and self.journal.curve(variant, seed, stage) != curve:
            listener = _Listener(self, variant, seed, stage)
            for line in curve:
                listener.metrics(line)
            listener.close()

    def _execute(self, stage: Stage, arm: _Arm, data: Data, probe: Data | None, seed: int, key: str, plan: Plan, title: str) -> Result:
        if not self.here.leads and stage.kind != "train":
            return Result.of(self.here.share())  # what is done once, the leader does
        place = f"{plan.variant}/seed-{seed}"
        alone = sum(s.kind == "export" for s in plan.stages) < 2
        # A checkpoint serves only the very stage that wrote it: same settings, data, code and input model.
        checkpoints = self.out / "checkpoints" / place / f"{stage.name}-{key[:12]}"
        if not checkpoints.is_dir() and any(checkpoints.parent.glob(f"{stage.name}-*")):
            self.progression.say(f"  {title}: the job, its data or layerwise changed since this stage was stopped; it starts anew")
        self.progression.start(title)
        listener = _Listener(self, plan.variant, seed, stage.name)
        try:
            with metered(torch.device(self.device)) as meter:
                model, result = run_stage(
                    resolved(stage, arm.models), self._model(stage, arm), data, seed, self.device, probe=probe,
                    checkpoints=checkpoints, exports=self.out / "exports" / place / ("" if alone else stage.name), listener=listener,
                )  # fmt: skip
        finally:
            listener.close()
        if not self.here.leads:
            return Result.of(self.here.share())
        result.seconds, result.peak_bytes = meter.seconds, meter.peak_bytes
        if stage.kind == "train":
            result.curve = self.journal.curve(plan.variant, seed, stage.name)
            # Time of earlier, interrupted attempts is in the last line.
            result.seconds = max(result.seconds, result.curve[-1].get("seconds", 0.0) if result.curve else 0.0)
            result.after = size(model)
        with self.cache.keep(key, result) as folder:
            if stage.changes_model:
                save(model, folder / "model", tokenizer=data.tokenizer)
        if checkpoints.is_dir():
            shutil.rmtree(checkpoints, ignore_errors=True)
        self.here.share(result.data())
        return result

    def _model(self, stage: Stage, arm: _Arm) -> Model:
        """The model a stage begins with. For sharded training only the leader makes it; the others lay it out without values."""
        if not (isinstance(stage.spec, TrainSpec) and stage.spec.parallel == "fsdp" and self.here.world > 1):
            return arm.make()
        model = arm.make() if self.here.leads else None
        data = self.here.share(outline(model) if model is not None else None)
        if model is not None:
            return model
        # Weights that several layers share would be emptied apart from each other.
        return arm.make() if data["shared"] else outlined(data)

    def _data(self, spec: DataSpec) -> Data:
        key = digest(dataclasses.asdict(spec))
        if key not in self.data:
            self.progression.say(f"  loading {spec.source}")
            for turn in (True, False):  # the leader first: the others find what it prepared
                if self.here.leads == turn:
                    self.data[key] = load_data(spec, self.data_dir, self.cache_root)
                if turn:
                    self.here.share()
        return self.data[key]

    def _start(self, plan: Plan, data: Data, seed: int) -> _Arm:
        if isinstance(plan.model, Path):
            folder = plan.model
            files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
            return _Arm(digest(["load", files]), lambda: load_any(folder, self.device), {START: folder})
        spec = filled(plan.model, data)
        return _Arm(digest(["build", spec_data(spec), seed]), lambda: build(spec, seed, self.device))

    def _engine(self) -> list[Any]:
        """What else a result depends on: code, library, device, threads."""
        return [code_version(), torch.__version__, torch.device(self.device).type, torch.get_num_threads()]

    def _keep_model(self, plan: Plan, seed: int, arm: _Arm) -> None:
        """The arm's final model in the run folder, so that it does not depend on the cache."""
        if not self.here.leads or not any(stage.changes_model for stage in plan.stages):
            return
        target = self.out / "models" / plan.variant / f"seed-{seed}"
        source = self.cache.root / arm.key / "model"
        if source.is_dir() and not _same(source, target):
            with whole_folder(target) as folder:
                shutil.copytree(source, folder, dirs_exist_ok=True)


def _same(source: Path, target: Path) -> bool:
    """Whether a folder is whole and has the content that another one's checksums say."""
    try:
        check_folder(target)
        return (source / CHECKSUMS).read_text() == (target / CHECKSUMS).read_text()
    except (BadInput, OSError):
        return False


def _spoken(result: Result) -> str:
    words = [f"{k} {v:.4g}" for k, v in result.findings.get("metrics", {}).items()][:4]
    if result.removed:
        words.append(f"removed layers {', '.join(map(str, result.removed))}")
    return "  " + "  ".join(words) if words else ""


def _tracker(name: str, out: Path, run_name: str) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker

    PartialState(cpu=True)
    try:
        tracker = TensorBoardTracker(run_name=run_name, logging_dir=str(out / "trackers"))
        if hasattr(tracker, "start"):
            tracker.start()
        return tracker
    except ImportError as error:
        raise BadInput(f"the tracker {name} needs a package that is not installed: pip install 'layerwise[trackers]'") from error
