"""A model from whatever holds one: our checkpoint, a run folder, a Hugging Face folder, or a preset's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from layerwise.complaint import parsed
from layerwise.errors import BadInput
from layerwise.models.checkpoint import description, save
from layerwise.models.checkpoint import load as load_own
from layerwise.models.hf import export_hf, import_hf
from layerwise.models.hf.adapters import export_adapter
from layerwise.models.hf.folder import read_config
from layerwise.models.hf.gptq import export_gptq
from layerwise.models.model import Model, build
from layerwise.models.presets import PRESETS, preset
from layerwise.models.spec import ModelSpec
from layerwise.table import unknown


def load_any(source: str | Path, device: str = "cpu", dtype: torch.dtype | None = None, *, seed: int = 0, **overrides: Any) -> Model:
    """Load a model, or build a preset with fresh weights.

    Args:
        source: a folder (our checkpoint, a run, or a Hugging Face checkpoint), or a name in `layerwise.models.presets`.
        overrides: for presets: parts of the model's description, laid over it as in a job (`stack={"depth": 2, "layer": {"heads": 2}}`).

    Raises:
        BadInput: there is no such folder or preset, the folder holds no model, or an override names what no model has.
    """
    folder = Path(source)
    if folder.is_dir():
        if overrides:
            raise BadInput(f"overrides ({', '.join(overrides)}) shape a preset; a loaded model brings its own shape")
        inner = _run_model(folder)
        if (inner / "config.json").is_file() and not (inner / "model.json").is_file():
            return import_hf(inner, device=device, dtype=dtype)
        return load_own(inner, device=device, dtype=dtype)
    if str(source) in PRESETS:
        model = build(parsed(TypeAdapter(ModelSpec), preset(str(source), overrides), "model"), seed, device)
        return model if dtype is None else model.to(dtype)
    if "/" in str(source) or folder.suffix:
        raise BadInput(f"there is no folder {source}")
    raise unknown(str(source), PRESETS, "folder or preset")


def described(folder: Path) -> ModelSpec:
    """The description of the model in a folder, without its tensors.

    Raises:
        BadInput: the folder holds no model, or none that can be described.
    """
    inner = _run_model(folder)
    if (inner / "model.json").is_file():
        return description(inner / "model.json")[0]
    if (inner / "config.json").is_file():
        return read_config(inner)[1]
    raise BadInput(f"{folder} holds no model (no model.json and no config.json)")


def _run_model(folder: Path) -> Path:
    """The one model of a run folder; any other folder is returned as it is."""
    if not (folder / "models").is_dir() or not (folder / "job.yaml").is_file():
        return folder
    found = sorted(p.parent for p in (folder / "models").glob("*/seed-*/model.json"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(p.relative_to(folder)) for p in found) or "none"
    raise BadInput(f"{folder} is a run with {len(found)} models: name one of them ({names})")


def export(model: Model, folder: str | Path, *, format: str = "hf", tokenizer: Any = None, dtype: torch.dtype | None = None) -> Path:
    """Write a model for others: `hf` is a Hugging Face checkpoint, `peft` its low-rank terms alone, `gptq` one with packed matrices, `layerwise` our own format.

    Raises:
        BadInput: the format is neither, or no Hugging Face family can hold this model.
    """
    if format == "hf":
        return export_hf(model, Path(folder), tokenizer=tokenizer, dtype=dtype)
    if format == "layerwise":
        return save(model if dtype is None else model.to(dtype), Path(folder), tokenizer=tokenizer)
    if format == "peft":
        return export_adapter(model if dtype is None else model.to(dtype), Path(folder))
    if format == "gptq":
        return export_gptq(model, Path(folder), tokenizer=tokenizer, dtype=dtype)
    raise BadInput(f"format is hf, peft, gptq or layerwise; got '{format}'")
