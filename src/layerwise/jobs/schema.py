"""What a job file may say. `read_job` checks all of it, every variant, before anything is loaded, trained or written."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from layerwise.analyze import ANALYSES
from layerwise.complaint import parsed
from layerwise.data.spec import DataSpec
from layerwise.edit import EDITS
from layerwise.errors import BadInput
from layerwise.evaluate import EVALUATIONS
from layerwise.jobs.merge import VERBS, alike, changed, merged
from layerwise.jobs.metrics import is_among, measurable
from layerwise.jobs.reach import Reach
from layerwise.jobs.yamlfile import read_yaml
from layerwise.models.presets import preset
from layerwise.models.spec import ModelSpec
from layerwise.objectives import OBJECTIVES
from layerwise.table import nearest, unknown
from layerwise.train.spec import TrainSpec

Scale = Literal["smoke", "tiny", "mini", "small", "full"]
SCALES = get_args(Scale)
STEPS_TO_SMALL = ("tiny", "mini")
"""Sizes below `small`, by which a claim's trend is seen, or other data; only a job that defines them has them."""
VARIED = ("data", "model", "stages")
"""The sections of a job that variants change."""
LAYERS_AT_MOST = 10_000
TABLES = {"train": OBJECTIVES, "edit": EDITS, "analyze": ANALYSES, "evaluate": EVALUATIONS}
KINDS = {"train": "objective", "edit": "edit", "analyze": "analysis", "evaluate": "evaluation"}


_adapter = functools.cache(TypeAdapter)
"""Pydantic takes longer to make a validator than to use it."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Paper(Strict):
    """The publication behind a system."""

    title: str
    year: int
    arxiv: str | None = None
    authors: str | None = None


class Claim(Strict):
    """What the system says it does better, and on which number.

    Attributes:
        metric: a metric of one of the stages. direction: which way is better.
        method, baseline: the variants compared.
        paper_ratio: method / baseline in the paper, where it gives one.
    """

    text: str
    metric: str
    direction: Literal["lower", "higher"]
    method: str
    baseline: str
    paper_ratio: float | None = None


class Relation(Strict):
    """Two metrics that the paper says go together over all arms and seeds.

    Attributes:
        x, y: metrics. above: metric -> value it must reach for an arm and seed to be counted.
    """

    x: str
    y: str
    above: dict[str, float] = Field(default_factory=dict)


class Generate(Strict):
    """Options of a generate stage."""

    prompts: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    new: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)


class Export(Strict):
    """Options of an export stage."""

    format: Literal["hf", "peft", "gptq", "layerwise"]
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a job.

    Attributes:
        name: its key. kind: one of `VERBS`. what: the objective, edit, analysis or evaluation.
        options: of a stage that calls a function. spec: of a stage that trains, generates or exports.
        source: the stage's own data, if it does not use the job's. probe: a second data set that a training stage looks at.
    """

    name: str
    kind: str
    what: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    spec: TrainSpec | Generate | Export | None = None
    source: DataSpec | None = None
    probe: DataSpec | None = None

    @property
    def changes_model(self) -> bool:
        return self.kind in ("train", "edit")

    def data(self) -> dict[str, Any]:
        """Plain data that says exactly what the stage does (its name aside)."""
        spec = self.spec
        plain = spec.model_dump() if isinstance(spec, BaseModel) else dataclasses.asdict(spec) if spec is not None else None
        return {"kind": self.kind, "what": self.what, "options": self.options, "spec": plain}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One variant of a job, complete: data, a model to build or load, stages in order."""

    variant: str
    data: DataSpec
    model: ModelSpec | Path
    stages: tuple[Stage, ...]


class Job(Strict):
    """A job file's content. The parts that variants change stay plain data here; `plans` has them checked."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=80)
    title: str = ""
    card: str | None = None
    family: str | None = None
    kinds: list[str] = Field(default_factory=list)
    paper: Paper | None = None
    claim: Claim | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any]
    stages: dict[str, dict[str, Any]] = Field(min_length=1)
    relations: list[Relation] = Field(default_factory=list)
    reach: dict[str, Reach] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default={"default": {}}, min_length=1)
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    on_divergence: Literal["stop", "record"] = "stop"
    trackers: list[Literal["tensorboard"]] = Field(default_factory=list)
    scales: dict[Scale, dict[str, Any]] = Field(default_factory=dict)
    scale: Scale = "small"
    notes: list[str] = Field(default_factory=list)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds) or any(s < 0 for s in seeds):
            raise BadInput(f"seeds are distinct numbers >= 0; got {seeds}")
        return seeds

    @field_validator("variants", "stages")
    @classmethod
    def _folder_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", name):
                raise BadInput(f"'{name[:80]}' names a folder: it consists of at most 80 letters, digits, '-', '_' and '.'")
        return named

    def plans(self) -> dict[str, Plan]:
        """Every variant, checked on its own."""
        base = {"data": self.data, "model": self.model, "stages": self.stages}
        return {name: _varied(name, base, change) for name, change in self.variants.items()}


def read_job(source: dict[str, Any] | Path, *, scale: Scale | None = None, settings: dict[str, Any] | None = None) -> Job:
    """A job from plain data or a YAML file, at a scale, with settings applied.

    Raises:
        BadInput: anything in it is wrong; the message gives the path of the key and, for unknown names, the nearest known one.
    """
    raw = source if isinstance(source, dict) else read_yaml(source)
    defined = raw["scales"] if isinstance(raw.get("scales"), dict) else {}
    if scale in STEPS_TO_SMALL and scale not in defined:
        raise BadInput(
            f"this job has no scale '{scale}': it defines {', '.join(map(str, defined)) or 'none'}; take one of those or 'small'"
        )
    scale = scale or raw.get("scale") or "small"
    if scale not in SCALES:
        raise unknown(str(scale), SCALES, "scale")
    raw = changed({**_scaled(raw, scale), "scale": scale}, settings or {}, "--set")
    _finite(raw, "")
    if isinstance(raw.get("variants"), dict):
        # A scale may take a variant out by giving it as null.
        raw["variants"] = {name: change for name, change in raw["variants"].items() if change is not None}
    job = parsed(_adapter(Job), raw, "")
    plans = job.plans()
    for name, reach in job.reach.items():
        _check_reach(f"reach.{name}", reach, plans)
    if job.claim is not None:
        for role in ("method", "baseline"):
            name = getattr(job.claim, role)
            if name not in plans:
                raise BadInput(f"claim.{role}: there is no variant '{name}'.{nearest(name, plans)} Variants: {', '.join(plans)}.")
            _check_metric("claim.metric", job.claim.metric, plans[name], job.reach)
        if job.claim.method == job.claim.baseline:
            raise BadInput(f"claim: method and baseline are both '{job.claim.method}'; a claim compares two variants")
    return job


def _scaled(raw: dict[str, Any], scale: str) -> dict[str, Any]:
    """The job with the changes of a scale applied and its scales left out."""
    scales = raw.get("scales")
    if scales is None:
        return {key: value for key, value in raw.items() if key != "scales"}
    if not isinstance(scales, dict):
        raise BadInput(f"scales: a mapping is expected (got {str(scales)[:80]!r})")
    for name, change in scales.items():
        if name not in SCALES:
            raise BadInput(f"scales: {unknown(str(name), SCALES, 'scale')}")
        if not isinstance(change, dict | None):
            raise BadInput(f"scales.{name}: a mapping of paths to values is expected (got {str(change)[:80]!r})")
    raw = changed(raw, scales.get(scale) or {}, f"scales.{scale}")
    raw.pop("scales", None)
    return raw


def _finite(value: Any, where: str) -> None:
    """Refuse NaN and infinity, which pass every comparison with a limit or none."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _finite(key, where)
            _finite(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            _finite(inner, f"{where}.{i}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{where}: a finite number is expected; got {value}")
    elif isinstance(value, int) and abs(value) >= 2**63:
        shown = f"{value:.3g}" if value.bit_length() < 1000 else f"a number of {value.bit_length():,} bits"
        raise BadInput(f"{where}: {shown} is too large a number")


def _check_reach(where: str, reach: Reach, plans: dict[str, Plan]) -> None:
    """Refuse a target of no variant, and a stage that no variant trains."""
    if isinstance(reach.target, str) and reach.target not in plans:
        raise BadInput(f"{where}.target: there is no variant '{reach.target}'.{nearest(reach.target, plans)} Variants: {', '.join(plans)}.")
    trained = sorted({s.name for plan in plans.values() for s in plan.stages if s.kind == "train"})
    if reach.stage not in trained:
        raise BadInput(
            f"{where}.stage: no stage '{reach.stage}' trains.{nearest(reach.stage, trained)} Stages that do: {', '.join(trained) or 'none'}."
        )


def _check_metric(where: str, metric: str, plan: Plan, reach: dict[str, Reach]) -> None:
    """Refuse a metric that no stage of a plan can measure."""
    measuring = [s.name for s in plan.stages if s.kind in ("train", "analyze", "evaluate")]
    if not measuring:
        raise BadInput(f"{where}: no stage of '{plan.variant}' measures anything: add one that evaluates or analyzes")
    names = [s.name for s in plan.stages]
    stage = metric.rpartition(".")[0]
    if stage and stage not in names:
        raise BadInput(f"{where}: there is no stage '{stage}' in '{plan.variant}'.{nearest(stage, names)} Stages: {', '.join(names)}.")
    known = [f"{wanted.stage}.{name}" for name, wanted in reach.items()]
    for s in plan.stages:
        policies = [str(policy.get("name")) for policy in s.spec.policies] if isinstance(s.spec, TrainSpec) else []
        found = measurable(s.kind, s.what, policies)
        if found is None and stage in ("", s.name):
            return
        known += [f"{s.name}.{name}" for name in found or ()]
    if not is_among(metric, known if stage else [name.rpartition(".")[2] for name in known]):
        raise BadInput(
            f"{where}: no stage of '{plan.variant}' measures '{metric}'.{nearest(metric, known)} They measure {', '.join(known) or 'nothing'}."
        )


def _varied(variant: str, base: dict[str, Any], change: dict[str, Any]) -> Plan:
    """The plan of a variant; a complaint names the variant unless the job has the same fault without it."""
    where = f"variants.{variant}"
    for path in change:
        section = str(path).split(".")[0]
        if section not in VARIED:
            raise BadInput(
                f"{where}: '{path}' is not in a section that variants change.{nearest(section, VARIED)} They are {', '.join(VARIED)}."
            )
    data = changed(base, change, where)
    try:
        return _plan(variant, data, base["stages"])
    except BadInput as error:
        if not change or str(error).startswith(where):
            raise
        try:
            _plan(variant, base, base["stages"])
        except BadInput as plain:
            if str(plain) == str(error):
                raise
        raise BadInput(f"{where}: {error}") from error


def _plan(variant: str, data: dict[str, Any], before: dict[str, Any]) -> Plan:
    """A variant's plan from its plain data; `before` are the job's stages, which it may have taken out."""
    for section in VARIED:
        if not isinstance(data[section], dict):
            raise BadInput(f"{section}: a mapping is expected (got {str(data[section])[:80]!r})")
    data = _texts_as_keys(data)
    stages = tuple(_with_source(name, value, data["data"]) for name, value in alike(data["stages"], before).items())
    if not stages:
        raise BadInput(f"variants.{variant}: no stage is left")
    return Plan(variant, parsed(_adapter(DataSpec), data["data"], "data"), _model(data["model"]), stages)


def _texts_as_keys(value: Any) -> Any:
    """Keys that are numbers in YAML (`overrides: {3: ...}`) as the texts that specs are keyed by."""
    if isinstance(value, dict):
        return {str(k) if type(k) in (int, float) else k: _texts_as_keys(inner) for k, inner in value.items()}
    return [_texts_as_keys(inner) for inner in value] if isinstance(value, list) else value


def _model(data: dict[str, Any]) -> ModelSpec | Path:
    if "load" in data:
        extra = [key for key in data if key != "load"]
        if extra:
            raise BadInput(f"model.{extra[0]}: a loaded model brings its own description; give either load or a description")
        if not isinstance(data["load"], str):
            raise BadInput(f"model.load: a folder's path is expected; got {data['load']!r}")
        return Path(data["load"])
    if "preset" in data:
        try:
            data = preset(str(data["preset"]), {k: v for k, v in data.items() if k != "preset"})
        except BadInput as error:
            raise BadInput(f"model.preset: {error}") from error
    for part in ("stack", "decoder"):
        depth = data[part].get("depth") if isinstance(data.get(part), dict) else None
        if isinstance(depth, int | float) and depth > LAYERS_AT_MOST:
            raise BadInput(f"model.{part}.depth: at most {LAYERS_AT_MOST:,} layers; got {depth:,}")
    return parsed(_adapter(ModelSpec), data, "model")


def _with_source(name: str, value: Any, job_data: dict[str, Any]) -> Stage:
    """A stage; its `data` and `probe`, if it has them, are laid over the job's data and share its tokens."""
    if not isinstance(value, dict):
        return _stage(name, value)
    stage = _stage(name, {k: v for k, v in value.items() if k not in ("data", "probe")})
    if "probe" in value and stage.kind != "train":
        raise BadInput(f"stages.{name}.probe: only a stage that trains looks at a second data set; give this one data")
    given = {key: _laid_over(f"stages.{name}.{key}", value[key], job_data) for key in ("data", "probe") if value.get(key) is not None}
    return dataclasses.replace(stage, source=given.get("data"), probe=given.get("probe"))


def _laid_over(where: str, value: Any, job_data: dict[str, Any]) -> DataSpec:
    if not isinstance(value, dict):
        raise BadInput(f"{where}: a mapping is expected (got {str(value)[:80]!r})")
    source = parsed(_adapter(DataSpec), merged(job_data, value), where)
    if source.tokenizer.kind not in ("bytes", "file"):
        raise BadInput(f"{where}: stages share one vocabulary, so data.tokenizer.kind must be bytes or file; it is {source.tokenizer.kind}")
    return source


def _stage(name: str, value: Any) -> Stage:
    where = f"stages.{name}"
    if not isinstance(value, dict):
        raise BadInput(f"{where}: a stage is a mapping like {{train: causal-lm, steps: 100}}; got {value!r}")
    verbs = [verb for verb in VERBS if verb in value]
    if len(verbs) != 1:
        raise BadInput(f"{where}: a stage has exactly one of {', '.join(VERBS)}; this one has {', '.join(verbs) or 'none'}")
    kind = verbs[0]
    what, rest = value[kind], {k: v for k, v in value.items() if k != kind}
    if kind == "generate":
        prompts = [what] if isinstance(what, str) else what
        return Stage(name, kind, "generate", spec=parsed(_adapter(Generate), {"prompts": prompts, **rest}, where))
    if kind == "export":
        return Stage(name, kind, str(what), spec=parsed(_adapter(Export), {"format": what, **rest}, where))
    if not isinstance(what, str) or what not in TABLES[kind]:
        raise BadInput(f"{where}.{kind}: {unknown(what, TABLES[kind], KINDS[kind])}")
    if kind == "train":
        return Stage(name, kind, what, spec=parsed(_adapter(TrainSpec), {"objective": what, **rest}, where))
    return Stage(name, kind, what, options=rest)
