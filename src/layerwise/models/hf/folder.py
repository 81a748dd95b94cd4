"""Reading and writing a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.files import whole_folder, write_json
from layerwise.models.checkpoint import assemble, refuse_pickle, some
from layerwise.models.hf.family import Family
from layerwise.models.hf.table import FAMILIES, family_for
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.table import lookup, nearest

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


def import_hf(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Model:
    """The model of a Hugging Face checkpoint folder; its remote code, if it names any, is never run.

    Raises:
        BadInput: a family we do not have (the message says which ones we do), pickle files only, damaged files, tensors that
            are missing or left over (named).
    """
    folder = Path(folder)
    family, spec = read_config(folder)
    theirs = _tensors(folder, str(device))
    with torch.device("meta"):
        sizes = {name: t.shape[0] if t.dim() else 1 for name, t in Model(spec).state_dict().items()}
    ours: dict[str, Tensor] = {}
    missing = []
    for pair in family.pairs(spec):
        tensor = theirs.pop(pair.theirs, None)
        if tensor is None:
            missing.append(pair.theirs)
        else:
            ours |= dict(zip(pair.ours, pair.unpack(tensor, [sizes[n] for n in pair.ours]), strict=True))
    tied = {"lm_head.weight"} if spec.head is not None and spec.head.tie else set()
    extra = [n for n in theirs if not n.endswith(family.ignored or ("\0",)) and n not in tied]
    if missing or extra:
        raise BadInput(f"{folder} does not fit its config: missing {some(missing)}, unexpected {some(extra)}")
    return assemble(spec, ours, {}, dtype, folder)


def read_config(folder: Path) -> tuple[Family, ModelSpec]:
    """The family of a checkpoint folder and the description that its config.json amounts to; no tensor is read.

    Raises:
        BadInput: pickle files only, no usable config, or a family we do not have.
    """
    refuse_pickle(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{folder / 'config.json'} is not a model's config: {error}") from error
    if kind not in FAMILIES:
        raise BadInput(f"'{kind}' checkpoints are not known here.{nearest(str(kind), FAMILIES)} Families: {', '.join(sorted(FAMILIES))}.")
    family: Family = lookup(FAMILIES, kind, "family")
    try:
        return family, family.read(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder / 'config.json'} lacks or garbles {error}") from error


def export_hf(
    model: Model,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a model as a Hugging Face checkpoint: config, safetensors (sharded when large), tokenizer.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; `AutoTokenizer` loads what is written.
        max_length: longest sequence, for `max_position_embeddings` (2048 when not given).

    Raises:
        BadInput: no family can hold the model, or the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").is_file())):
        raise BadInput(f"{folder} holds something that is not a checkpoint: choose another folder")
    family = family_for(model.spec)
    state = model.state_dict()
    tensors = {p.theirs: p.pack([state[n].detach().cpu() for n in p.ours]) for p in family.pairs(model.spec)}
    if dtype is not None:
        tensors = {n: t.to(dtype) for n, t in tensors.items()}
    kind = next(iter(tensors.values())).dtype
    config = {**family.write(model.spec), "max_position_embeddings": max_length or 2048, "dtype": str(kind).removeprefix("torch.")}
    special = {} if tokenizer is None else _special(tokenizer)
    config |= {f"{role}_token_id": tokenizer.token_to_id(name) for role, name in special.items() if role in ("pad", "eos", "bos")}
    with whole_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        _write_shards(temporary, tensors, shard_bytes)
        if model.causal:
            write_json(temporary / "generation_config.json", {k: v for k, v in config.items() if k.endswith("_token_id")})
        if tokenizer is not None:
            from transformers import PreTrainedTokenizerFast

            named: Any = {f"{role}_token": name for role, name in special.items()}
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length or 2048, **named).save_pretrained(temporary)
    return folder


def _special(tokenizer: Any) -> dict[str, str]:
    """Special tokens by Hugging Face's role names."""
    names = {"pad": "<pad>", "eos": "<eos>", "unk": "<unk>", "mask": "<mask>", "cls": "<cls>", "sep": "<sep>"}
    return {role: name for role, name in names.items() if tokenizer.token_to_id(name) is not None}


def _tensors(folder: Path, device: str) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, following the index of a sharded one."""
    index = folder / INDEX
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise BadInput(f"{index} is not an index of shards: {error}") from error
    found: dict[str, Tensor] = {}
    for name in names:
        if Path(str(name)).name != name:
            raise BadInput(f"{index} names a file outside its folder: {name}")
        try:
            with safe_open(folder / name, framework="pt", device=device) as file:
                found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{folder / name} cannot be read: {error}") from error
    return found


def _write_shards(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
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
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
