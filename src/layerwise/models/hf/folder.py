"""Reading and writing a Hugging Face checkpoint folder."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.files import CHECKSUMS, check_folder, read_json, whole_folder, write_json
from layerwise.models.checkpoint import assemble, refuse_pickle, some
from layerwise.models.hf.config import merged_config, special_tokens
from layerwise.models.hf.family import Family, Pair, is_tied, layer_ties, parts_of, shapes_of
from layerwise.models.hf.gptq_read import Place, packed_linears, read_settings, take_packed, with_linears
from layerwise.models.hf.pooling import pooling_of
from layerwise.models.hf.shards import read_names, read_sizes, read_tensors, write_tensors
from layerwise.models.hf.sidecars import read_sidecars, write_sidecars
from layerwise.models.hf.table import FAMILIES, family_for
from layerwise.models.model import Model
from layerwise.models.origin import Origin, origin_of, with_origin
from layerwise.models.spec import ModelSpec, model_spec, spec_data
from layerwise.stack.parts_spec import LinearSpec
from layerwise.table import lookup, nearest

SHARD_BYTES = 5_000_000_000
MOST_LAYERS = 10_000
"""A config that asks for more is damaged; building what it describes would take for ever."""


def import_hf(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Model:
    """The model of a Hugging Face checkpoint folder, plain or with matrices in the GPTQ format, which stay packed; its remote code, if it
    names any, is never run.

    Args:
        dtype: of the floating-point weights (None: as stored).

    Raises:
        BadInput: a family we do not have (the message says which ones we do), pickle files only, damaged files, tensors that
            are missing or left over (named).
    """
    folder = Path(folder)
    config = _config(folder)
    _check_sums(folder)
    family, spec = _described(folder, config)
    try:
        theirs = _renamed(family, read_tensors(folder, str(device)), spec)
        packed: dict[str, Tensor] = {}
        linears: dict[Place, LinearSpec] = {}
        if (settings := read_settings(config)) is not None:
            linears = packed_linears(family, spec, {name: tuple(t.shape) for name, t in theirs.items()}, settings)
            packed = take_packed(family, spec, theirs, linears, settings)
        # Nothing else holds what is read: a tensor goes when ours are made of it.
        spec, ours, carried = _ours(family, spec, theirs)
        ours = {name: t for name, t in ours.items() if t.device.type != "meta"} | packed
        spec = with_linears(spec, linears) if linears else spec
    except BadInput as error:
        raise BadInput(f"{folder} does not fit its config: {error}") from error
    model = assemble(spec, ours, dict(family.shared) | layer_ties(spec), dtype, folder)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    return with_origin(model, Origin(config, _generation(folder), carried, read_sidecars(folder)))


def read_config(folder: Path) -> tuple[Family, ModelSpec]:
    """The family of a checkpoint folder and the description that its config.json amounts to; no tensor is read.

    Raises:
        BadInput: pickle files only, no usable config, or a family we do not have.
    """
    config = _config(folder)
    family, spec = _described(folder, config)
    try:
        settings = read_settings(config)
        linears = packed_linears(family, spec, read_sizes(folder), settings) if settings is not None else {}
    except BadInput as error:
        raise BadInput(f"{folder} does not fit its config: {error}") from error
    return family, with_linears(spec, linears) if linears else spec


def export_hf(
    model: Model,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    change: Callable[[dict[str, Tensor], dict[str, Any]], None] | None = None,
) -> Path:
    """Write a model as a Hugging Face checkpoint: config, safetensors (sharded when large), tokenizer.

    A model that came from such a checkpoint goes back into the same family where it still fits, with everything in the old
    config that the model itself does not decide.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; `AutoTokenizer` loads what is written.
        dtype: of the floating-point weights (None: as they are).
        max_length: longest sequence the model is meant for (None: what its old config says, or 2048). Learned positions and
            an old config that allows more are not shortened by it.
        shard_bytes: size above which the weights are spread over several files.
        change: alters their tensors and config, in place, before they are written.

    Raises:
        BadInput: no family can hold the model, or the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").is_file())):
        raise BadInput(f"{folder} holds something that is not a checkpoint: choose another folder")
    origin = origin_of(model)
    family = family_for(model.spec, preferred=origin.config.get("model_type") if origin is not None else None)
    if origin is not None and origin.config.get("model_type") != family.name:
        origin = None
    tensors = _theirs(family, model)
    architecture = _architecture(family, model.spec, origin)
    same_width = origin is not None and _same_width(family, model.spec, origin)
    if origin is not None and same_width and origin.config.get("architectures") in (None, [architecture]):
        tensors |= origin.carried  # a model with another head has no use for what stood beside the old one
    if architecture == family.base[0]:
        tensors = {n.removeprefix(family.prefix): t for n, t in tensors.items()}
    if dtype is not None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    config = merged_config(family, model.spec, origin, architecture, max_length)
    config["dtype"] = str(next(t.dtype for t in tensors.values() if t.is_floating_point())).removeprefix("torch.")
    special = special_tokens(tokenizer, config) if tokenizer is not None else {}
    written = family.write(model.spec)
    for role in ("pad", "eos", "bos"):
        if role in special and config.get(f"{role}_token_id") is None and f"{role}_token_id" not in written:
            config[f"{role}_token_id"] = tokenizer.token_to_id(special[role])
    if change is not None:
        change(tensors, config)
    with whole_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        write_tensors(temporary, tensors, shard_bytes)
        if origin is not None and same_width:
            write_sidecars(temporary, origin.sidecars)
        if model.causal and model.spec.head is not None:
            ids = {k: v for k, v in config.items() if k.endswith("_token_id") and v is not None}
            write_json(temporary / "generation_config.json", ids | (origin.generation if origin is not None else {}))
        if tokenizer is not None:
            _write_tokenizer(tokenizer, temporary, special, config.get("max_position_embeddings") or max_length or 2048)
    return folder


def pairs_of(model: Model) -> tuple[Family, list[Pair]]:
    """The family that an export would choose, and its table of names."""
    origin = origin_of(model)
    family = family_for(model.spec, preferred=origin.config.get("model_type") if origin is not None else None)
    return family, family.pairs(model.spec)


def _config(folder: Path) -> dict[str, Any]:
    refuse_pickle(folder)
    path = folder / "config.json"
    try:
        config = read_json(path)
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path} is not a model's config: {error}") from error
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise BadInput(f"'{kind}' checkpoints are not known here.{nearest(str(kind), FAMILIES)} Families: {', '.join(sorted(FAMILIES))}.")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        deep = [key for key, value in part.items() if "layer" in str(key) and isinstance(value, int) and value > MOST_LAYERS]
        if deep:
            raise BadInput(f"{path}: {deep[0]} is {part[deep[0]]}; at most {MOST_LAYERS} layers are read")
    if config.get("auto_map"):
        warnings.warn(f"{path} names code of its own (auto_map); it is not run", stacklevel=2)
    try:
        read_settings(config)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    return config


def _check_sums(folder: Path) -> None:
    """Compare the files of a folder that layerwise exported with the checksums it wrote beside them."""
    if (folder / CHECKSUMS).is_file():
        try:
            check_folder(folder)
        except BadInput as error:
            raise BadInput(f"{error}; if the change was meant, delete {CHECKSUMS}") from error


def _described(folder: Path, config: dict[str, Any]) -> tuple[Family, ModelSpec]:
    family: Family = lookup(FAMILIES, config["model_type"], "family")
    path = folder / "config.json"
    try:
        spec = family.read(config, _has_head(family, folder, config))
        # Numbers that are none, or not whole, are found here and not inside a module that is built from them.
        spec = model_spec(spec_data(spec))
        if isinstance(spec, ModelSpec):
            spec = dataclasses.replace(spec, pool=pooling_of(read_sidecars(folder)))
        if any(isinstance(part.embedding, TokenSpec) and part.embedding.vocab is None for part in parts_of(spec)):
            raise BadInput("config.json: vocab_size is missing")
        if any(getattr(part.embedding, "channels", 0) is None for part in parts_of(spec)):
            raise BadInput("config.json: num_channels is missing")
        return family, spec
    except BadInput as error:
        raise BadInput(f"{folder}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{path} is not a model's config: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError, IndexError) as error:
        raise BadInput(f"{path} lacks or garbles {error}") from error


def _has_head(family: Family, folder: Path, config: dict[str, Any]) -> bool:
    """Whether a checkpoint has a vocabulary head: its config names the architecture, or else its tensors tell."""
    named = (config.get("architectures") or [None])[0]
    if named in family.headed or named in family.base:
        return named in family.headed
    if named is not None:
        raise BadInput(
            f"config.json: {named} has a head that is not known here; layerwise reads {', '.join((*family.headed, *family.base))}"
        )
    heads = tuple(rule.theirs for rule in family.rules if rule.ours[0].split(".")[0] == "head")
    try:
        stored = read_names(folder)
    except BadInput:
        return True
    return any(name.startswith(heads) or (family.prefix and name.startswith(family.prefix)) for name in stored)


def _renamed(family: Family, tensors: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names that the family's table has: old endings renewed, the prefix put in front."""
    known = {name for pair in family.pairs(spec) for name in (pair.theirs, *pair.also, *pair.unused)}
    found: dict[str, Tensor] = {}
    bare = not family.prefix or not any(name.startswith(family.prefix) for name in tensors)
    for name, tensor in tensors.items():
        for old, new in family.renamed:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        longer = family.prefix + name
        if bare and name not in known and (longer in known or longer.startswith(family.carried or ("\0",))):
            name = longer
        found[name] = tensor
    return found


def _ours(family: Family, spec: ModelSpec, theirs: dict[str, Tensor]) -> tuple[ModelSpec, dict[str, Tensor], dict[str, Tensor]]:
    """The description that the tensors show, our tensors, and those that are carried along.

    Raises:
        BadInput: a tensor is missing, left over, of another shape, or differs from one that it should be.
    """
    shapes = shapes_of(spec)
    pairs = family.pairs(spec, shapes)
    if is_tied(spec) and _has_a_head_of_its_own(family, family.scored(spec), pairs, theirs):
        # As transformers does: two different matrices are not tied, whatever the config says.
        assert spec.head is not None
        spec = dataclasses.replace(spec, head=dataclasses.replace(spec.head, tie=False))
        shapes = shapes_of(spec)
        pairs = family.pairs(spec, shapes)
    ours: dict[str, Tensor] = {}
    missing: list[str] = []
    for pair in pairs:
        there = [theirs.pop(name) for name in (pair.theirs, *pair.also) if name in theirs]
        if not there:
            missing.append(pair.theirs)
            continue
        if any(not torch.equal(there[0], other) for other in there[1:]):
            raise BadInput(f"{pair.theirs} and {', '.join(pair.also)} are one tensor in a {family.name}; here they differ")
        ours |= pair.unpack(there[0], shapes)
    unused = {name for pair in pairs for name in pair.unused}
    carried = {n: t.to("cpu") for n, t in theirs.items() if n in unused or n.startswith(family.carried or ("\0",))}
    extra = [n for n in theirs if n not in carried and not n.endswith(family.ignored or ("\0",))]
    if missing or extra:
        raise BadInput(f"missing {some(missing)}, unexpected {some(extra)}")
    return spec, ours, carried


def _has_a_head_of_its_own(family: Family, name: str, pairs: list[Pair], theirs: Mapping[str, Tensor]) -> bool:
    """Whether a head that the config ties to the embedding is another matrix in the file."""
    pair = next(p for p in pairs if name in p.ours)
    tokens = next((theirs[n] for n in (pair.theirs, *pair.also) if n in theirs and n not in family.head_names), None)
    return tokens is not None and any(n in theirs and not torch.equal(tokens, theirs[n]) for n in family.head_names)


def _theirs(family: Family, model: Model) -> dict[str, Tensor]:
    """The model's tensors under their names, none of them sharing memory with another."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for second, first in family.shared:
        if not torch.equal(state[second], state[first]):
            raise BadInput(f"a {family.name} has one tensor as {first} and {second}; in this model they differ")
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()
    for pair in family.pairs(model.spec, state):
        packed = pair.pack(state).contiguous()
        if packed.untyped_storage().data_ptr() in memory:
            packed = packed.clone()
        memory.add(packed.untyped_storage().data_ptr())
        tensors[pair.theirs] = packed
        tensors |= {name: packed.clone() for name in pair.unused}
    return tensors


def _architecture(family: Family, spec: ModelSpec, origin: Origin | None) -> str:
    """The class name to write: the one the model came with, if it still has such a head."""
    possible = family.base if spec.head is None else family.lm if spec.head.kind == "lm" else family.classifier
    possible = tuple(family.write(spec).get("architectures", possible))
    came = (origin.config.get("architectures") or [None])[0] if origin is not None else None
    return came if came in possible else possible[0]


def _same_width(family: Family, spec: ModelSpec, origin: Origin) -> bool:
    """Whether tensors that a model carries along still have the model's width."""
    before = family.read(origin.config, spec.head is not None)
    return [part.stack.width for part in parts_of(before)] == [part.stack.width for part in parts_of(spec)]


def _generation(folder: Path) -> dict[str, Any]:
    """The folder's generation settings; none if there are none or they cannot be read."""
    try:
        found = read_json(folder / "generation_config.json")
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_tokenizer(tokenizer: Any, folder: Path, special: dict[str, str], max_length: int) -> None:
    from transformers import PreTrainedTokenizerFast

    named: Any = {f"{role}_token": name for role, name in special.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **named).save_pretrained(folder)
