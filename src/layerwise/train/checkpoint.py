"""The state of a training stage on disk: safetensors and JSON, whole or absent, never pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput, LayerwiseError
from layerwise.files import check_folder, whole_folder, write_json
from layerwise.safetensor import load_tensors, save_tensors

KEPT = 2
STATE = "state.safetensors"


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write the state after `step` steps to `folder/step-...`; the newest `KEPT` are kept.

    Raises:
        LayerwiseError: it could not be written (no room); those before it are untouched.
    """
    target = folder / f"step-{step:09d}"
    try:
        with whole_folder(target) as temporary:
            save_tensors(temporary / STATE, tensors)
            write_json(temporary / "meta.json", {"step": step, **meta})
    except OSError as error:
        whole = [path.name for path in checkpoints(folder)]
        kept = f"the checkpoint {whole[-1]} before it is whole" if whole else "there is none before it"
        raise LayerwiseError(f"the checkpoint of step {step} could not be written ({error}); {kept}") from error
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints below `folder`, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def load_state(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint (by its step) whose checksums hold; damaged ones are named to `say` and passed over. None if there is none."""
    found = checkpoints(folder)
    for i, path in reversed(list(enumerate(found))):
        try:
            check_folder(path)
            return load_tensors(path / STATE), json.loads((path / "meta.json").read_text())
        except (BadInput, OSError, ValueError) as error:
            say(f"{error}; " + (f"going back to the checkpoint before it, {found[i - 1].name}" if i else "no other is left: starting anew"))
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as tensors by name, `<parameter number>.<key>`; numbers become float64 scalars."""
    state = optimizer.state_dict()["state"]
    return {
        f"{i}.{key}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for i, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        i, key = name.split(".", 1)
        state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
