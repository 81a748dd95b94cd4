"""Tensors in one safetensors file or several with an index, as Hugging Face lays them out."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from layerwise.errors import BadInput
from layerwise.files import read_json, write_json
from layerwise.safetensor import load_tensors, save_tensors, tensor_names, tensor_sizes

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_tensors(folder: Path, device: str) -> dict[str, Tensor]:
    """All tensors of a folder.

    Raises:
        BadInput: a file is missing or damaged, or the index names one outside the folder.
    """
    found: dict[str, Tensor] = {}
    for path in _files(folder):
        found |= load_tensors(path, device)
    return found


def read_names(folder: Path) -> list[str]:
    """The names of all tensors of a folder; none of them is read. An index is believed."""
    index = folder / INDEX
    if index.is_file():
        return list(_weight_map(index))
    return tensor_names(folder / WHOLE)


def read_sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The sizes of all tensors of a folder by name; none of them is read."""
    found: dict[str, tuple[int, ...]] = {}
    for path in _files(folder):
        found |= tensor_sizes(path)
    return found


def write_tensors(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    """One file, or several of at most `shard_bytes` each (a larger tensor has one for itself) with their index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        here = tensor.numel() * tensor.element_size()
        if shards[-1] and size + here > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += here
    if len(shards) == 1:
        save_tensors(folder / WHOLE, tensors)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        return [folder / WHOLE]
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{index} names a file outside its folder, or one that is not safetensors: {name}")
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = read_json(index)["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BadInput(f"{index} is not an index of shards: {error}") from error
