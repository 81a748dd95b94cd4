"""Options that name a model: `teacher: stage:whole` is the model as stage `whole` left it, `start` the one the job loads, anything else
a checkpoint's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.errors import BadInput
from layerwise.files import sha256
from layerwise.jobs.schema import Stage
from layerwise.models.load import described
from layerwise.models.spec import ModelSpec
from layerwise.table import nearest
from layerwise.train.spec import TrainSpec

MODELS = ("teacher", "other", "ghn", "of")
"""Options that hold a model, in whatever objective, edit or analysis has one of these names."""
STAGE, START = "stage:", "start"


def references(stage: Stage) -> dict[str, str]:
    """Option -> what it refers to, for a stage's options that name a model."""
    options = stage.spec.options if isinstance(stage.spec, TrainSpec) else stage.options
    return {name: str(options[name]) for name in MODELS if options.get(name) is not None}


def check_references(stage: Stage, earlier: Sequence[Stage], model: ModelSpec | Path) -> None:
    """Refuse a reference to a stage that leaves no model before this one, or to a folder that holds none.

    Raises:
        BadInput: as said; the message lists what could be named.
    """
    leave = [s.name for s in earlier if s.changes_model]
    for name, what in references(stage).items():
        if what.startswith(STAGE):
            if (wanted := what.removeprefix(STAGE)) not in leave:
                raise BadInput(
                    f"{name}: no earlier stage '{wanted}' leaves a model.{nearest(wanted, leave)} Stages that do: {', '.join(leave) or 'none'}."
                )
        elif what == START:
            if not isinstance(model, Path):
                raise BadInput(
                    f"{name}: '{START}' is the model that a job loads; this job builds one: name a stage that trains it (stage:NAME)"
                )
        elif not Path(what).is_dir():
            raise BadInput(f"{name}: there is no folder {what}; give a checkpoint's folder, or stage:NAME for the model as a stage left it")
        else:
            described(Path(what))


def resolved(stage: Stage, models: Mapping[str, Path]) -> Stage:
    """The stage with folders in place of names; `models` has the folder of `start` and of the model that every earlier stage left."""
    found = {name: str(models[what.removeprefix(STAGE)]) for name, what in references(stage).items() if _within(what)}
    if not found:
        return stage
    if isinstance(stage.spec, TrainSpec):
        return dataclasses.replace(stage, spec=dataclasses.replace(stage.spec, options={**stage.spec.options, **found}))
    return dataclasses.replace(stage, options={**stage.options, **found})


def contents(stage: Stage) -> list[Any]:
    """Digests of the folders that a stage names: its result depends on what is in them. (Models of the job itself are in the key already.)"""
    folders = [Path(what) for what in references(stage).values() if not _within(what)]
    return [sha256(p) for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()]


def _within(what: str) -> bool:
    return what == START or what.startswith(STAGE)
