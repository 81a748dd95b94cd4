"""Tensors in one safetensors file, the only format of weights that is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.memory import check_room


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        BadInput: it is missing, damaged, or larger than this machine's memory.
    """
    try:
        check_room(path.stat().st_size, f"reading {path}")
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error


def tensor_names(path: Path) -> list[str]:
    """The names of a file's tensors; none of them is read.

    Raises:
        BadInput: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error


def tensor_sizes(path: Path) -> dict[str, tuple[int, ...]]:
    """The sizes of a file's tensors by name; none of them is read.

    Raises:
        BadInput: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, wherever they are, to a file.

    Raises:
        OSError: there is no room, or the place cannot be written.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(held, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
