"""`layerwise plan`: how a model becomes so small, or so fast, at the least loss, as a job that can be run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter

from layerwise.complaint import parsed
from layerwise.data.load import Data, Split
from layerwise.errors import BadInput
from layerwise.files import write_file, write_json
from layerwise.jobs.check import check_device
from layerwise.jobs.inspection import texts_for, tokenizer_of
from layerwise.jobs.receipt import environment
from layerwise.jobs.stages import stage_seed
from layerwise.jobs.statistics import mean_interval, rank_correlation
from layerwise.models.checkpoint import save
from layerwise.models.load import load_any
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.models.two_towers import TwoTowers
from layerwise.nn.linears.factors import Kept
from layerwise.plan.choice import FAMILIES, LEVELS, Choice, How, applied, check_plannable, previewed, stages
from layerwise.plan.damage import Damages, Probe, damages
from layerwise.plan.latency import LayerLatency, Work, milliseconds
from layerwise.plan.measure import measure_for
from layerwise.plan.search import Candidate, Space, check_reachable
from layerwise.plan.size import LayerBytes, model_bytes
from layerwise.plan.trials import COMBINED, METHODS, UNIFORM, Best, Trials, mean
from layerwise.report.plan_page import write_plan_page
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec


@dataclass
class Planned:
    """What was planned for a model.

    Attributes:
        found: for each target size, in the order given. trials: all that was measured. sensitivity: of every single change. whole: loss of the
            model as it is, on the rows that plans are chosen by and on those held out. bytes: of the model as it is. ms: its latency. healed: its loss on the rows held out after as much training as plans are healed by.
    """

    source: str
    bytes: int
    whole: tuple[float, float]
    found: list[Best]
    trials: Trials
    sensitivity: Damages
    ms: float | None = None
    healed: float | None = None
    notes: list[str] = field(default_factory=list)


def plan_model(
    source: str,
    *,
    targets: Sequence[float],
    out: Path,
    target_ms: float | None = None,
    work: Work | None = None,
    text: str | None = None,
    length: int = 128,
    rows: int = 256,
    tries: int = 6,
    how: How | None = None,
    seed: int = 0,
    heal: int = 0,
    heal_lr: float = 5e-4,
    apply: Path | None = None,
    data_dir: Path | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = lambda message: None,
) -> Planned:
    """Search, measure and write `plan.json`, `plan.html` and for each target a job, `plan-SIZE.yaml`, into the new folder `out`.

    Args:
        source: a checkpoint's folder. targets: bytes of the weights on disk over those of the model as it is, in (0, 1].
        target_ms, work: the latency that a plan may have at most, and of what.
        text, length: what it is calibrated, chosen and judged on, in rows of so many tokens (None: built-in English).
        rows: of validation text to choose by, and of held-out text to judge by. tries: candidates of each method that are measured.
        heal: steps that the best of every method are trained for, before they are rounded; then they are compared. heal_lr: the highest learning rate.
        apply: the folder for the model that the first target's plan makes.

    Raises:
        BadInput: the model is none of text, a target cannot be reached, or a folder holds something; nothing is written.
    """
    how = how or How()
    check_device(device)
    for folder in (out, apply):
        if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"{folder} exists already: choose a new folder")
    targets = list(dict.fromkeys(targets))
    for target in targets:
        if not 0 < target <= 1:
            raise BadInput(f"--target-size is a share of the model's bytes, in (0, 1]; got {target:g}")
    if not Path(source).is_dir():
        raise BadInput(f"there is no folder {source}: a plan is made for a trained model")
    if tokenizer_of(source) is None:
        raise BadInput(f"{source} holds no tokenizer.json, so text cannot become its tokens")
    model = load_any(source, device)
    if isinstance(model, TwoTowers):
        raise BadInput("a plan is made for one stack of layers; this model has two towers")
    check_plannable(model.spec)
    if work is not None and target_ms is not None and work.phase == "decode" and not model.causal:
        raise BadInput("an encoder reads whole texts and continues none: --latency-of prefill")
    dtype = _one_type(model)
    levels, notes = possible_levels(model.spec, how)
    families = [family for family, names in FAMILIES.items() if any(name in levels for name in names)]
    work = (work or Work()) if target_ms is not None else None
    embedding: Any = model.spec.embedding
    if work is not None and embedding.position == "learned" and work.length >= embedding.max_length:
        raise BadInput(f"--latency-length {work.length}: this model has {embedding.max_length} positions, and one more token is decoded")
    latency = LayerLatency(model.spec, work, dtype, device) if work is not None else None
    space = Space(model.spec, LayerBytes(dtype), levels, how, latency)
    whole = model_bytes(model.spec, dtype)
    for target in targets:
        check_reachable(space, families, int(target * whole), whole, None)
    data, note = held_out(texts_for(source, model, text, data_dir, length), rows)
    measure = measure_for(model, data, str(Path(source).resolve()))
    how = dataclasses.replace(how, **measure.scores)
    moves = [Choice(**{name: level}) for name, chosen in levels.items() for level in chosen]
    probe = Probe(model, data, measure, samples=how.samples, batch=how.batch, seed=seed + 1)  # other rows than those that are calibrated on
    kept: Kept = {}  # a matrix is decomposed once, whatever ranks are tried
    sensitivity = damages(probe, moves, lambda plan: applied(model, data, stages(plan, how), seed, kept=kept), say)
    space.expect(sensitivity)
    for target in targets:
        check_reachable(space, families, int(target * whole), whole, target_ms)
    trials = Trials(
        model, data, measure, space, probe, how, rows=rows, batch=how.batch, seed=seed, work=work, say=say,
        between=healing(measure.training, heal, heal_lr, dtype), train=partial(_trained, data=data, seed=seed, device=device), kept=kept,
    )  # fmt: skip
    found = [trials.best(target, int(target * whole), families, ms=target_ms, tries=tries) for target in targets]
    as_is: Candidate | None = None
    if heal:
        found = [trials.heal(best) for best in found]
        as_is = trials.healed(space.candidate(space.as_is, "as it is"))
        notes.append(f"Healed by {heal} steps before rounding. The model as it is, trained as long: held-out loss {as_is.held_out:.4f}.")
    for best in found:
        for candidate in best.methods.values():
            if candidate is not None:
                trials.hold_out(candidate)
    for candidate in trials.front():
        trials.hold_out(candidate)
    planned = Planned(
        source, whole, (trials.whole, mean(trials.losses(model, "test"))), found, trials, sensitivity,
        milliseconds(model, work) if work is not None else None, as_is.held_out if as_is is not None else None, [*notes, note],
    )  # fmt: skip
    for best in found:
        write_file(out / _job_name(best, found), yaml.safe_dump(_job(planned, best, data), sort_keys=False, allow_unicode=True))
    page = plan_data(planned)
    write_json(out / "plan.json", page)
    write_plan_page(page, out / "plan.html")
    if apply is not None:
        save(trials.make(found[0].plan), apply, tokenizer=data.tokenizer)
    return planned


def healing(training: Mapping[str, Any], steps: int, lr: float, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """The stages that train a model for a while, in float32 whatever it is stored in."""
    stored = str(dtype).removeprefix("torch.")
    fit = {**training, "steps": steps, "batch": 8, "optimizer": {"lr": lr}, "schedule": {"name": "cosine", "warmup": 0.1}}
    return {"widen": {"edit": "cast", "dtype": "float32"}, "heal": fit, "store": {"edit": "cast", "dtype": stored}}


def _trained(model: Model, name: str, stage: Mapping[str, Any], *, data: Data, seed: int, device: str) -> Model:
    """What a training stage of that name and content makes of a copy of the model: training works in place, and layers are shared."""
    spec = parsed(TypeAdapter(TrainSpec), {"objective": stage["train"], **{k: v for k, v in stage.items() if k != "train"}}, name)
    return train(copy.deepcopy(model), data, spec, seed=stage_seed(seed, name), device=device).model.eval()


def _one_type(model: Model) -> torch.dtype:
    types = {p.dtype for p in model.parameters()}
    if len(types) > 1:
        raise BadInput(f"the model's weights are of several types ({', '.join(sorted(map(str, types)))}): convert it with --dtype first")
    return types.pop()


def possible_levels(spec: ModelSpec, how: How) -> tuple[dict[str, tuple[Any, ...]], list[str]]:
    """Of every field of a choice the levels that this model can have, and why ways of making it smaller are left out."""
    levels: dict[str, tuple[Any, ...]] = {}
    notes = []
    for family, names in FAMILIES.items():
        reason = "a single layer cannot be left out"
        for name in names:
            kept = []
            for level in LEVELS[name] if name != "drop" or spec.stack.depth > 1 else ():
                try:
                    previewed(
                        spec,
                        stages((Choice(**{name: level}),) * (1 if name == "tokens" else spec.stack.depth), how) if name != "drop" else {},
                    )
                    kept.append(level)
                except BadInput as error:
                    reason = str(error)
            levels |= {name: tuple(kept)} if kept else {}
        if family in METHODS and not any(name in levels for name in names):
            notes.append(f"{METHODS[family]} is left out: {reason}")
    return levels, notes


def held_out(data: Data, rows: int) -> tuple[Data, str]:
    """The data with a test split that nothing is chosen by: its own, or the second half of its validation rows; and a note that says so."""
    if data.test is not None:
        return data, f"Chosen on {min(rows, len(data.validation))} validation rows, judged on {min(rows, len(data.test))} test rows."
    half = len(data.validation) // 2
    if not half:
        raise BadInput("one row of validation text is too little to choose by one half and to judge by the other: give more text")

    def part(first: int, last: int) -> Split:
        return dataclasses.replace(data.validation, arrays={n: a[first:last] for n, a in data.validation.arrays.items()})

    count = min(rows, half)
    note = f"Chosen on {count} rows of the first half of the validation text, judged on {count} rows of the second half."
    return dataclasses.replace(data, validation=part(0, half), test=part(half, len(data.validation))), note


def _job_name(best: Best, found: Sequence[Best]) -> str:
    return "plan.yaml" if len(found) == 1 else f"plan-{best.target:g}.yaml"


def _job(planned: Planned, best: Best, data: Data) -> dict[str, Any]:
    """The plan as a job: the model, its edits, and the loss before and after."""
    source = dataclasses.asdict(data.spec)
    measure = {
        **planned.trials.measure.evaluation,
        "batch": planned.trials.batch,
        "batches_at_most": -(-planned.trials.rows // planned.trials.batch),
    }
    return {
        "name": "plan",
        "title": f"{Path(planned.source).name} at {best.plan.bytes / planned.bytes:.3f} of its bytes",
        "data": {k: v for k, v in source.items() if k in ("source", "columns", "length", "validation", "seed")}
        | {"tokenizer": {k: source["tokenizer"][k] for k in ("kind", "path")}},
        "model": {"load": str(Path(planned.source).resolve())},
        "stages": {"before": measure, **planned.trials.stages(best.plan), "after": dict(measure)},
        "seeds": [planned.trials.seed],
    }


def compared(best: Best) -> dict[str, Any]:
    """The plan against the best single method of its size, on held-out rows: a difference, its interval over batches, and a sentence."""
    rival = best.rival
    if rival is None:
        return {"outcome": "alone", "sentence": "No single method makes the model so small; only their combination does."}
    name, single = rival
    short = [n for n, c in best.methods.items() if c is None and n not in (UNIFORM, COMBINED)]
    tail = f" {', '.join(short).capitalize()} alone cannot make it so small." if short else ""
    if single is best.plan:
        said = f"No combination that was tried beats the best single method, {name}: the plan is that method."
        return {"outcome": "same", "rival": name, "sentence": said + tail}
    each = [a - b for a, b in zip(best.plan.held_out_by_batch, single.held_out_by_batch, strict=True)]
    mean, interval = mean_interval(each)
    outcome = "open" if interval is None or interval[0] <= 0 <= interval[1] else "beats" if mean < 0 else "loses"
    words = {"beats": "beats", "loses": "does not beat", "open": "cannot be told from"}[outcome]
    said = f"held-out loss {best.plan.held_out:.4f} against {single.held_out:.4f}, difference {mean:+.4f}"
    said += f" (95 % over batches {interval[0]:+.4f} to {interval[1]:+.4f})" if interval else ""
    found = {"outcome": outcome, "rival": name, "difference": mean, "ci95": list(interval) if interval else None}
    return {**found, "sentence": f"The plan {words} the best single method, {name}: {said}.{tail}"}


def predictions(trials: Trials) -> dict[str, Any]:
    """How well what was expected of candidates, when they were chosen, ranks what they lost."""
    points = [(c.predicted, c.added) for c in trials.tried.values() if c.added is not None]
    return {"spearman": rank_correlation(points), "points": len(points)}


def plan_data(planned: Planned) -> dict[str, Any]:
    """Plain data of all of it: `plan.json`, from which the page is drawn."""
    trials = planned.trials

    def shown(candidate: Candidate) -> dict[str, Any]:
        made = {
            "bytes": candidate.bytes,
            "share": candidate.bytes / planned.bytes,
            "families": list(candidate.families),
            "method": candidate.tried_by,
        }
        made |= {"predicted": candidate.predicted, "loss": candidate.loss, "added": candidate.added, "held_out": candidate.held_out}
        made |= {"ms": candidate.ms, "measured_ms": candidate.measured_ms} if trials.work is not None else {}
        return {**made, "layers": [c.data() for c in candidate.plan]}

    targets = [
        {
            "target": best.target, "budget": best.budget, "target_ms": best.ms, "plan": shown(best.plan), **compared(best),
            "methods": {name: None if c is None else shown(c) for name, c in best.methods.items()},
        }
        for best in planned.found
    ]  # fmt: skip
    return {
        "schema": 1, "model": Path(planned.source).name, "bytes": planned.bytes, "loss": planned.whole[0], "held_out": planned.whole[1],
        "held_out_healed": planned.healed, "ms": planned.ms, "latency": None if trials.work is None else dataclasses.asdict(trials.work), "how": dataclasses.asdict(trials.how),
        "measure": {"name": trials.measure.name, "unit": trials.measure.unit}, "seed": trials.seed, "healed": planned.found[0].plan.healed, "targets": targets, "front": [shown(c) for c in trials.front()],
        "tried": [shown(c) for c in trials.tried.values()],
        "prediction": predictions(trials), "notes": planned.notes, "environment": environment(str(trials.model.device)),
        "sensitivity": [
            {**move.data(), "added": [d.added for d in each], "divergence": [d.divergence for d in each]}
            for move, each in planned.sensitivity.items()
        ], "data": trials.data.sources,
    }  # fmt: skip


def plan_rows(planned: Planned, best: Best) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows that show one target in a terminal: the plan, then every method at that size."""
    timed = planned.trials.work is not None
    rows: list[list[Any]] = [["as it is", 1.0, planned.whole[0], planned.whole[1], None, *([planned.ms] if timed else [])]]
    for name in (COMBINED, *METHODS.values(), UNIFORM):
        candidate = best.methods.get(name)
        if name in best.methods and candidate is None:
            rows.append([name, None, "unreachable", None, None, *([None] if timed else [])])
        elif candidate is not None:
            mark = f"{name} *" if candidate is best.plan else name
            ms = [candidate.measured_ms] if timed else []
            rows.append([mark, candidate.bytes / planned.bytes, candidate.loss, candidate.held_out, candidate.predicted, *ms])
    return ["method (* the plan)", "size", "loss", "held-out loss", "expected added", *(["ms"] if timed else [])], rows


def layer_rows(best: Best) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows that show what becomes of each layer."""
    rows = [[i if choice.tokens is None else "tokens", str(choice)] for i, choice in enumerate(best.plan.plan)]
    return ["layer", "what becomes of it"], rows
