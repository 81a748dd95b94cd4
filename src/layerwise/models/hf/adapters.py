"""LoRA in and out in the format of the `peft` library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from layerwise.errors import BadInput
from layerwise.files import read_json, whole_folder, write_json
from layerwise.models.checkpoint import refuse_pickle, some
from layerwise.models.hf.family import Family, stack_of
from layerwise.models.hf.layouts import TURNED
from layerwise.models.hf.table import family_for
from layerwise.models.model import Model
from layerwise.models.origin import origin_of
from layerwise.models.spec import ModelSpec
from layerwise.nn.linear import LoRA
from layerwise.safetensor import load_tensors, save_tensors
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import LayerSpec, StackSpec

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BEGINS = "base_model.model."


def without_adapters(spec: ModelSpec) -> ModelSpec:
    """The description of the model that the low-rank terms were added to."""

    def plain(layer: LayerSpec) -> LayerSpec:
        return dataclasses.replace(layer, linears={role: s for role, s in layer.linears.items() if s.kind != "lora"})

    changed: dict[str, Any] = {}
    for name in ("stack", "decoder"):
        if isinstance(stack := getattr(spec, name), StackSpec):
            changed[name] = stack.with_layers([plain(layer) for layer in stack.layers])
    return dataclasses.replace(spec, **changed, adapters_only=False)


def export_adapter(model: Model, folder: str | Path) -> Path:
    """Write a model's low-rank terms alone, for `peft.PeftModel.from_pretrained(base, folder)`; `base` is the model without them.

    Raises:
        BadInput: the model has none, no Hugging Face family holds the model, a matrix is part of a larger one there (GPT-2's query,
            key and value), or the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file())):
        raise BadInput(f"{folder} holds something that is not an adapter: choose another folder")
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}
    if not found:
        raise BadInput("this model has no low-rank terms: attach and train them first (edit: lora)")
    family, theirs, turned = _modules(model)
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, module in found.items():
        if name not in theirs:
            raise BadInput(f"{name} is part of a larger matrix in a {family.name}, so it cannot have a low-rank term of its own there")
        tensors[f"{BEGINS}{theirs[name]}.lora_A.weight"] = module.lora_a.detach().cpu().contiguous()
        tensors[f"{BEGINS}{theirs[name]}.lora_B.weight"] = module.lora_b.detach().cpu().contiguous()
        ranks[theirs[name]] = rank = module.lora_a.shape[0]
        alphas[theirs[name]] = module.scale * rank
    first, turns = next(iter(ranks)), {turned[name] for name in found}
    if len(turns) > 1:
        raise BadInput(
            f"in a {family.name} some of these matrices are stored turned and some are not; peft's file says one of the two for all"
        )
    config = {
        "peft_type": "LORA",
        "task_type": _task(model.spec),
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {n: r for n, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alphas[first]},
        "lora_dropout": next(iter(found.values())).dropout.p,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": turns.pop(),
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    with whole_folder(folder) as temporary:
        write_json(temporary / CONFIG, config)
        save_tensors(temporary / TENSORS, tensors)
    return folder


def read_adapter(model: Model, folder: str | Path) -> dict[str, tuple[LinearSpec, Tensor, Tensor]]:
    """What an adapter's folder adds to a model: name of our linear -> (its description, A, B).

    Raises:
        BadInput: no such folder, pickle only, another method than LoRA, or matrices that this model does not have.
    """
    folder = Path(folder)
    refuse_pickle(folder)
    try:
        config = read_json(folder / CONFIG)
        kind, rank, alpha, dropout = (
            config["peft_type"],
            int(config["r"]),
            float(config["lora_alpha"]),
            float(config["lora_dropout"] or 0.0),
        )
        ranks, alphas = dict(config.get("rank_pattern") or {}), dict(config.get("alpha_pattern") or {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{folder} holds no adapter of peft ({CONFIG}): {error}") from error
    odd = [k for k in ("use_dora", "use_rslora", "modules_to_save", "layer_replication", "lora_bias") if config.get(k)]
    if kind != "LORA" or odd or config.get("bias", "none") != "none":
        raise BadInput(f"{folder} holds {kind} with {', '.join(odd) or 'trained biases'}; plain LoRA is what can be read")
    _, theirs, _ = _modules(model)
    ours = {name: own for own, name in theirs.items()}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_tensors(folder / TENSORS, str(model.device)).items():
        module, _, end = name.removeprefix(BEGINS).rpartition(".lora_")
        pairs.setdefault(module, {})[end] = tensor
    strange = sorted(m for m, pair in pairs.items() if m not in ours or pair.keys() != {"A.weight", "B.weight"})
    if strange or not pairs:
        raise BadInput(f"{folder} changes matrices that this model does not have: {some(strange)}")
    found = {}
    for module, pair in pairs.items():
        a, b = pair["A.weight"], pair["B.weight"]
        own = int(_pattern(ranks, module, rank))
        linear: Any = model.get_submodule(ours[module])
        weight = linear.weight
        if tuple(a.shape) != (own, weight.shape[1]) or tuple(b.shape) != (weight.shape[0], own):
            raise BadInput(
                f"{folder}: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}; the matrix is {tuple(weight.shape)}, r {own}"
            )
        found[ours[module]] = LinearSpec("lora", rank=own, alpha=float(_pattern(alphas, module, alpha)), dropout=dropout), a, b
    return found


def adapter_family(spec: ModelSpec) -> Family:
    """The family whose names an adapter of this description would use.

    Raises:
        BadInput: there is none, or nothing to write.
    """
    if without_adapters(spec).stack == spec.stack:
        raise BadInput("there are no low-rank terms to export: add an edit lora before this stage")
    return family_for(without_adapters(spec))


def _modules(model: Model) -> tuple[Family, dict[str, str], dict[str, bool]]:
    """The family; our linears -> their modules, where it is one to one; whether theirs is stored turned."""
    spec = without_adapters(model.spec)
    origin = origin_of(model)
    family = family_for(spec, preferred=origin.config.get("model_type") if origin is not None else None)
    theirs, turned = {}, {}
    for pair in family.pairs(spec):
        if len(pair.ours) == 1 and pair.theirs.endswith(".weight"):
            own = pair.ours[0].removesuffix(".weight")
            name = pair.theirs.removesuffix(".weight")
            theirs[own] = name if spec.head is not None else name.removeprefix(family.prefix)
            turned[own] = pair.layout is TURNED
    return family, theirs, turned


def _task(spec: ModelSpec) -> str | None:
    if spec.decoder is not None:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if spec.causal and spec.head is not None and stack_of(spec).depth else None


def _pattern(table: dict[str, Any], module: str, usual: float) -> float:
    """The value of the longest key that the module's name ends with, as peft matches them."""
    fitting = [key for key in table if module == key or module.endswith(f".{key}")]
    return table[max(fitting, key=len)] if fitting else usual
