"""The state of a training stage on disk: safetensors and JSON, whole or absent, never pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.files import check_folder, whole_folder, write_json

KEPT = 2


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    """Write the state after `step` steps to `folder/step-...`; the newest `KEPT` are kept."""
    target = folder / f"step-{step:09d}"
    with whole_folder(target) as temporary:
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, temporary / "state.safetensors")
        write_json(temporary / "meta.json", {"step": step, **meta})
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints below `folder`, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def load_state(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint whose checksums hold; damaged ones are named to `say` and passed over. None if there is none."""
    for path in reversed(checkpoints(folder)):
        try:
            check_folder(path)
            return load_file(path / "state.safetensors"), json.loads((path / "meta.json").read_text())
        except (BadInput, OSError, ValueError) as error:
            say(f"{error}; going back to the checkpoint before it")
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
