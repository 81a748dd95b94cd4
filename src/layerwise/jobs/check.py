"""Going through a plan without running it: every option typed, every stage possible on the model that reaches it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch

from layerwise import analyze, evaluate
from layerwise.data.builtin import KINDS, LABELLED, RECALL
from layerwise.data.load import check_source
from layerwise.data.tokenizer import SPECIALS
from layerwise.edit import PREVIEWS
from layerwise.edit.adapt import Role
from layerwise.embed.audio_spec import MelSpec, WaveSpec
from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.jobs.options import checked_options
from layerwise.jobs.references import STAGE, START, check_references, references
from layerwise.jobs.schema import TABLES, Export, Job, Plan, Stage
from layerwise.memory import check_room
from layerwise.models.hf import family_for
from layerwise.models.hf.adapters import adapter_family
from layerwise.models.hf.gptq import preview_gptq
from layerwise.models.load import described
from layerwise.models.plain_spec import PlainStackSpec
from layerwise.models.room import check_model
from layerwise.models.spec import ModelSpec
from layerwise.nn.linear import LINEARS
from layerwise.objectives import OBJECTIVES
from layerwise.optim import OPTIMIZERS
from layerwise.optim.groups import check_options
from layerwise.optim.spec import OptimizerSpec
from layerwise.stack.layer import MIXERS
from layerwise.stack.spec import StackSpec, indices
from layerwise.table import lookup, unknown
from layerwise.train.policies import POLICIES
from layerwise.train.spec import TrainSpec

NEEDS_HEAD = {
    "composition": "lm",
    "causal-lm": "lm",
    "recall": "lm",
    "answers": "lm",
    "masked-lm": "lm",
    "language-modeling": "lm",
    "classification": "classifier",
    "chain-search": "classifier",
    "fusion-curve": "classifier",
    "ensemble-accuracy": "classifier",
    "deep-supervision": "classifier",
    "forward-forward": "classifier",
    "mono-forward": "classifier",
    "turned-classification": "classifier",
    "ghn": "parameters",
    "ghn-start": "parameters",
    "layer-drop": "lm",
    "router-lm": "lm",
    "continuation": "lm",
    "early-exit-lm": "lm",
    "early-exits": "lm",
    "self-speculation": "lm",
    "token-router-lm": "lm",
    "token-routing": "lm",
    "block-drop": "lm",
    "block-sweep": "lm",
    "bits-curve": "lm",
    "multiple-choice": "lm",
}
CAUSAL = (
    "causal-lm",
    "recall",
    "answers",
    "language-modeling",
    "layer-drop",
    "block-drop",
    "block-sweep",
    "bits-curve",
    "multiple-choice",
    "early-exit-lm",
    "early-exits",
    "self-speculation",
    "router-lm",
    "continuation",
    "token-router-lm",
    "token-routing",
)
"""Stages that score the next token."""
CONTAINED = {"distillation": "", "filters": "classification", "distilled-masked-lm": "masked-lm"}
"""Objectives that contain another one, which has the needs; the one where `task` names none."""
CHECKS = analyze.CHECKS | evaluate.CHECKS
OF_A_LOSS = ("taylor", "gradient-norm", "layer-drop")
"""Scores of layers and weights that need an objective."""


def check_job(job: Job, *, data_dir: Path | None = None, device: str = "cpu") -> dict[str, Plan]:
    """Every variant's plan with options typed and defaults filled in.

    Raises:
        BadInput: something in the job cannot work; nothing was loaded, trained or written.
    """
    check_device(device)
    plans = {}
    for name, plan in job.plans().items():
        with _prefixed(f"variants.{name}: " if len(job.variants) > 1 else ""):
            check_source(plan.data, data_dir)
            for stage in plan.stages:
                for source in (stage.source, stage.probe):
                    if source is not None:
                        with _prefixed(f"stages.{stage.name}: "):
                            check_source(source, data_dir)
            plans[name] = dataclasses.replace(plan, stages=tuple(rehearsed(plan)))
    return plans


def check_fits(plans: dict[str, Plan]) -> None:
    """Whether this machine could hold the models of a checked job, as it starts with them and as edits leave them, and its batches.

    Raises:
        BadInput: something alone takes more than all its memory.
    """
    for name, plan in plans.items():
        with _prefixed(f"variants.{name}: " if len(plans) > 1 else ""):
            spec, loaded = _starting_spec(plan), isinstance(plan.model, Path)
            if not loaded:  # what is loaded cannot be larger than its files
                with _prefixed("model: "):
                    check_model(spec)
            for stage in plan.stages:
                with _prefixed(f"stages.{stage.name}: "):
                    if stage.kind == "edit":
                        spec = lookup(PREVIEWS, stage.what, "preview")(spec, **stage.options)
                        check_model(spec, 2 if loaded else 4)
                    elif isinstance(stage.spec, TrainSpec) and isinstance(spec.embedding, TokenSpec):
                        rows, length = stage.spec.batch // stage.spec.accumulate, (stage.source or plan.data).length
                        check_room(8 * rows * length, f"a batch of {rows:,} rows of {length:,} tokens")


def check_device(device: str) -> torch.device:
    """The device of that name.

    Raises:
        BadInput: there is no such device here.
    """
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise BadInput(f"--device {device}: not a device; write cpu, cuda or cuda:1") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise BadInput(f"--device {device}: not available here; use cpu")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise BadInput(f"--device {device}: layerwise runs on cpu, cuda and mps")
    return chosen


@contextmanager
def _prefixed(prefix: str) -> Iterator[None]:
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{prefix}{error}") from error


def rehearsed(plan: Plan) -> Iterator[Stage]:
    """The plan's stages with complete options, each checked against the description of the model it will meet."""
    spec = _starting_spec(plan)
    _check_parts(spec)
    _match_data(spec, plan)
    left = {START: spec}
    for i, stage in enumerate(plan.stages):
        with _prefixed(f"stages.{stage.name}: "):
            there = plan if stage.source is None else dataclasses.replace(plan, data=stage.source)
            for source in (stage.source, stage.probe):
                if source is not None:
                    _match_data(spec, dataclasses.replace(plan, data=source))
            _check_head(stage, spec, there)
            check_references(stage, plan.stages[:i], plan.model)
            if isinstance(stage.spec, TrainSpec):
                _check_teacher(stage.spec, spec, left)
                yield dataclasses.replace(stage, spec=_checked_training(stage.spec, spec, probe=stage.probe is not None))
            elif isinstance(stage.spec, Export):
                if stage.spec.format == "gptq":
                    family_for(preview_gptq(spec))
                elif stage.spec.format != "layerwise":
                    (family_for if stage.spec.format == "hf" else adapter_family)(spec)
                yield stage
            elif stage.spec is not None:
                if not spec.causal:
                    raise BadInput("only a causal model can generate text")
                if spec.head is None or spec.head.kind != "lm":
                    raise BadInput("only a model with a head of kind lm can generate text: set model.head.kind")
                yield stage
            else:
                function = lookup(TABLES[stage.kind], stage.what, stage.kind)
                stage = dataclasses.replace(stage, options=checked_options(function, stage.options, stage.what))
                if objective := _measured_by(stage):
                    _check_head(dataclasses.replace(stage, what=objective), spec, there)
                    _check_objective(objective, {}, spec)
                if stage.kind == "edit":
                    spec = lookup(PREVIEWS, stage.what, "preview")(spec, **stage.options)
                elif stage.what in CHECKS:
                    named = {option: _named(what, left) for option, what in references(stage).items()}
                    lookup(CHECKS, stage.what, "check")(spec, **{**stage.options, **named})
                yield stage
        left[STAGE + stage.name] = spec


def _starting_spec(plan: Plan) -> ModelSpec:
    """The description of the model a plan begins with."""
    if isinstance(plan.model, Path):
        if not plan.model.is_dir():
            raise BadInput(f"model.load: there is no folder {plan.model}")
        with _prefixed("model.load: "):
            return described(plan.model)
    return plan.model.with_vocab(plan.data.tokenizer.vocab)


def _checked_training(train: TrainSpec, spec: ModelSpec, *, probe: bool) -> TrainSpec:
    _check_objective(train.objective, train.options, spec)
    check_options(train.optimizer)
    _check_optimizer(train.optimizer)
    for key in train.optimizer.depth_lr:
        indices(key, spec.stack.depth)
    for chosen in () if isinstance(train.recompute, bool) else train.recompute:
        for stack in (spec.stack, spec.decoder):
            if stack is not None:
                indices(chosen, stack.depth)
    if train.recompute and isinstance(spec.stack, PlainStackSpec) and any(layer.norm == "batch" for layer in spec.stack.layers):
        raise BadInput("recompute: batch norms would count every batch twice in their running statistics; leave recompute out")
    policies = []
    for policy in train.policies:
        options = {k: v for k, v in policy.items() if k != "name"}
        if not isinstance(policy["name"], str):
            raise unknown(str(policy["name"]), POLICIES, "policy")
        kind = lookup(POLICIES, policy["name"], "policy")
        complete = checked_options(kind, options, f"policies.{policy['name']}")
        if (check := getattr(kind, "check", None)) is not None:
            with _prefixed(f"policies.{policy['name']}: "):
                check(train)
        if kind.probes and not probe:
            raise BadInput(f"policies.{policy['name']} looks at a second data set: give the stage a probe, like {{source: ...}}")
        with _prefixed(f"policies.{policy['name']}: "):
            kind(**complete).meets(spec)
        for key in complete.get("layers") or ():
            indices(key, spec.stack.depth)
        policies.append({"name": policy["name"], **complete})
    return dataclasses.replace(train, policies=tuple(policies))


def _check_objective(name: str, options: Mapping[str, Any], spec: ModelSpec) -> None:
    """Whether there is such an objective, which has these options and can look at such a model."""
    objective = lookup(OBJECTIVES, name, "objective")
    checked_options(objective, options, "options")
    if (check := getattr(objective, "check", None)) is not None:
        check(spec)


def _named(what: str, left: Mapping[str, ModelSpec]) -> ModelSpec:
    """The description of a model that an option names; `left` has those of the job itself."""
    return left[what] if what in left else described(Path(what))


def _check_teacher(train: TrainSpec, spec: ModelSpec, left: Mapping[str, ModelSpec]) -> None:
    """Let an objective that learns from a teacher compare the two descriptions; `left` has those that references name."""
    kind, teacher = lookup(OBJECTIVES, train.objective, "objective"), train.options.get("teacher")
    if hasattr(kind, "check_teacher") and isinstance(teacher, str):
        complete = checked_options(kind, train.options, "options")
        kind.check_teacher(complete, spec, _named(teacher, left))


def _check_optimizer(spec: OptimizerSpec) -> None:
    """Make the optimizer of a single number: it says itself which values it cannot have."""
    try:
        lookup(OPTIMIZERS, spec.name, "optimizer")([torch.nn.Parameter(torch.zeros(1, 1))], lr=spec.lr, **spec.options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise BadInput(f"optimizer: '{spec.name}' cannot have these options {spec.options}: {error}") from error


def _check_head(stage: Stage, spec: ModelSpec, plan: Plan) -> None:
    what = stage.what
    if isinstance(stage.spec, TrainSpec) and what in CONTAINED:
        what = str(stage.spec.options.get("task", CONTAINED[what]))
    if what == "linear-probe" and stage.options.get("target", "label") == "label":
        _check_labels(what, plan)
    need = NEEDS_HEAD.get(what)
    if need is None:
        return
    have = spec.head.kind if spec.head is not None else "no"
    if have != need:
        raise BadInput(f"{what} needs a model with a head of kind {need}; this one has {have} head: set model.head.kind")
    if spec.decoder is not None:
        raise BadInput(f"{what} reads one text a row; this model is an encoder-decoder, which needs a source and a target: take a decoder")
    if what in CAUSAL and not spec.causal:
        raise BadInput(f"{what} needs causal layers (model.stack.layer.causal: true); this model sees the answer")
    if what == "masked-lm" and spec.causal:
        raise BadInput("masked-lm needs layers that see both sides; this model's are causal")
    if isinstance(spec.stack, PlainStackSpec) and need == "lm":
        raise BadInput(f"{what} reads text; this model reads images")
    if stage.what == "continuation" and not plan.data.pairs:
        raise BadInput("continuation compares with targets: name the columns of prompts and targets in data.pairs")
    if stage.what in ("recall", "answers") and _builtin(plan) is not None and plan.data.source.removeprefix("builtin:") not in RECALL:
        raise BadInput(
            f"{stage.what} needs texts that ask something, and {plan.data.source} asks nothing: set data.source to builtin:{', builtin:'.join(RECALL)}"
        )
    if need == "classifier":
        _check_labels(what, plan)


def _check_labels(what: str, plan: Plan) -> None:
    if _builtin(plan) == "text" and plan.data.source.removeprefix("builtin:") not in LABELLED:
        raise BadInput(f"{what} needs data with labels; {plan.data.source} has none")


def _measured_by(stage: Stage) -> str | None:
    """The objective whose loss or gradients an edit or analysis will look at, if it does."""
    chosen = [stage.options[name] for name in ("by", "adapt") if name in stage.options]
    return stage.options.get("objective") if not chosen or any(by in OF_A_LOSS for by in chosen) else None


def _builtin(plan: Plan) -> str | None:
    """What a built-in corpus consists of, text, images or sound; None for other sources."""
    return KINDS.get(plan.data.source.removeprefix("builtin:")) if plan.data.source.startswith("builtin:") else None


def _match_data(spec: ModelSpec, plan: Plan) -> None:
    """Refuse data that the model cannot read, as far as that is known before it is loaded."""
    embedding, data = spec.embedding, plan.data
    reads = "text" if isinstance(embedding, TokenSpec) else "sound" if isinstance(embedding, WaveSpec | MelSpec) else "images"
    given = _builtin(plan)
    if given is not None and given != reads:
        raise BadInput(f"the model reads {reads} but {data.source} is {given}")
    if not isinstance(embedding, TokenSpec):
        return
    if embedding.position == "learned" and embedding.max_length < data.length:
        raise BadInput(
            f"model.embedding.max_length is {embedding.max_length}, too few learned positions for rows of data.length {data.length}"
        )
    size = len(SPECIALS) + 256
    given_vocab = getattr(plan.model.embedding, "vocab", None) if isinstance(plan.model, ModelSpec) else None
    if data.tokenizer.kind == "bytes" and given_vocab is not None and given_vocab < size:
        raise BadInput(f"model.embedding.vocab is {given_vocab}, but the tokenizer has {size} tokens: leave vocab out")


def _check_parts(spec: ModelSpec) -> None:
    """Refuse layers of unknown parts, and layers that do not fit on one another."""
    for stack in (spec.stack, spec.decoder):
        if not isinstance(stack, StackSpec):
            continue
        for i, layer in enumerate(stack.layers):
            if layer.mixer not in MIXERS:
                raise unknown(layer.mixer, MIXERS, "mixer")
            if layer.width != stack.width:
                raise BadInput(f"layer {i} has width {layer.width} in a stack of width {stack.width}; all layers have the stack's")
            for role, linear in layer.linears.items():
                if role not in get_args(Role):
                    raise BadInput(f"model.stack.layer.linears: {unknown(role, get_args(Role), 'linear')}")
                if linear.kind not in LINEARS:
                    raise BadInput(f"model.stack.layer.linears.{role}: {unknown(linear.kind, LINEARS, 'kind of linear')}")
