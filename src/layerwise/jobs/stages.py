"""Running one stage on a model: what the six kinds of stages do."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from layerwise.analyze.cost import size
from layerwise.analyze.findings import Findings, Table
from layerwise.data.load import Data
from layerwise.errors import BadInput
from layerwise.infer.generate import generate
from layerwise.jobs.cache import Result
from layerwise.jobs.options import takes_data
from layerwise.jobs.schema import TABLES, Export, Generate, Stage
from layerwise.models.hf import export_hf
from layerwise.models.load import export
from layerwise.models.model import Model
from layerwise.table import lookup
from layerwise.train.loop import Listener, train
from layerwise.train.spec import TrainSpec


def stage_seed(seed: int, name: str) -> int:
    """The seed of a stage: the same for a stage of that name in every variant, so that arms are paired."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big") >> 1


def run_stage(
    stage: Stage,
    model: Model,
    data: Data,
    seed: int,
    device: str,
    *,
    checkpoints: Path,
    exports: Path,
    listener: Listener,
    probe: Data | None = None,
) -> tuple[Model, Result]:
    """Do what a stage says.

    Args:
        probe: the second data set of a training stage. checkpoints: folder for its states. exports: folder an export stage writes to.

    Returns:
        The model after the stage, and what the stage found.
    """
    result = Result()
    if isinstance(stage.spec, TrainSpec):
        own = stage_seed(seed, stage.name)
        trained = train(model, data, stage.spec, seed=own, device=device, folder=checkpoints, listener=listener, probe=probe)
        model, result.findings = trained.model, trained.findings.data()
    elif isinstance(stage.spec, Generate):
        result.findings = _generated(model, data, stage.spec, seed).data()
    elif isinstance(stage.spec, Export):
        result.findings = _exported(model, data, stage.spec, exports).data()
    else:
        function = lookup(TABLES[stage.kind], stage.what, stage.kind)
        options = {**stage.options, **({"seed": seed} if stage.options.get("seed", 0) is None else {})}
        made = function(model, data, **options) if takes_data(function) else function(model, **options)
        if stage.kind == "edit":
            result.before, result.after = size(model), size(made)
            result.removed = _removed(model, made)
            model = made
        else:
            result.findings = made.data()
    return model, result


def _removed(old: Model, new: Model) -> list[int] | None:
    """The layers an edit took out, if taking out layers is all it did to the stack."""
    kept = {id(layer) for layer in new.stack.layers}
    gone = [i for i, layer in enumerate(old.stack.layers) if id(layer) not in kept]
    return gone if gone and len(gone) == old.stack.depth - new.stack.depth else None


def _generated(model: Model, data: Data, spec: Generate, seed: int) -> Findings:
    if data.tokenizer is None:
        raise BadInput("this data has no tokenizer, so there is no text to continue")
    rows: list[list[Any]] = []
    for prompt in spec.prompts:
        start = data.tokenizer.encode(prompt).ids
        if not start:
            raise BadInput(f"the prompt {prompt!r} has no tokens")
        ids = torch.tensor([start], device=model.device)
        made = generate(model, ids, new=spec.new, temperature=spec.temperature, top_p=spec.top_p, stop=data.eos_id, seed=seed)
        rows.append([prompt, data.tokenizer.decode(made[0, ids.shape[1] :].tolist())])
    return Findings(tables=[Table("Continuations", ["prompt", "text"], rows)])


def _exported(model: Model, data: Data, spec: Export, folder: Path) -> Findings:
    dtype = getattr(torch, spec.dtype) if spec.dtype else None
    if spec.format == "hf":
        length = getattr(data.train, "tokens_per_row", None) or None
        export_hf(model, folder, tokenizer=data.tokenizer, dtype=dtype, max_length=length)
    else:
        export(model, folder, format=spec.format, tokenizer=data.tokenizer, dtype=dtype)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    table = Table(f"Exported files ({spec.format})", ["file", "bytes"], [[str(p.relative_to(folder)), p.stat().st_size] for p in files])
    return Findings({"export_bytes": sum(p.stat().st_size for p in files)}, [table])
