"""Small trained additions to frozen layers: LoRA attached and merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from layerwise.edit.linears import merge, with_layers
from layerwise.errors import BadInput
from layerwise.models.hf.adapters import read_adapter
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec
from layerwise.nn.linear import LoRA
from layerwise.nn.linears.quantized import QLoRA
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import LayerSpec, StackSpec

Role = Literal["q", "k", "v", "o", "gate", "up", "down", "cross.q", "cross.k", "cross.v", "cross.o"]


def lora(
    model: Model,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[Role] = ("gate", "up", "down"),
    freeze: bool = True,
    seed: int | None = None,
) -> Model:
    """The model with a low-rank term on the `targets` of every layer; it computes exactly what it did before.

    Packed matrices (nf4, packed) stay packed beneath the term. The weights are shared with the given model, which stays as it is.

    Args:
        rank, alpha, dropout: see `layerwise.nn.linear.LoRA`; alpha None means alpha = rank.
        freeze: everything but the low-rank terms stops being trained, embedding and head included.

    Source: Hu et al. 2021; feed-forward targets and alpha = rank as Gromov et al. 2024 heal with (appendix B).
    """
    new = rebuilt(model, preview_lora(model.spec, rank=rank, alpha=alpha, dropout=dropout, targets=targets, freeze=freeze))
    generator = torch.Generator(device=model.device).manual_seed(seed or 0)
    for module in new.modules():
        if isinstance(module, LoRA | QLoRA):
            dtype = module.weight.dtype if isinstance(module, LoRA) else model.token_matrix.dtype
            for name in ("lora_a", "lora_b"):
                empty = torch.empty_like(getattr(module, name), device=model.device, dtype=dtype)
                setattr(module, name, nn.Parameter(empty))
            module.reset_adapter(generator)
    return new


def load_lora(model: Model, *, folder: str, freeze: bool = True) -> Model:
    """The model with the low-rank terms that the `peft` library left in a folder.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        freeze: everything but the low-rank terms stops being trained.

    Raises:
        BadInput: the folder holds no plain LoRA, or one for another model.
    """
    found = read_adapter(model, folder)
    changed: dict[str, Any] = {}
    for side in ("stack", "decoder"):
        stack = getattr(model.spec, side)
        if isinstance(stack, StackSpec):
            changed[side] = stack.with_layers([_with_linears(layer, f"{side}.layers.{i}.", found) for i, layer in enumerate(stack.layers)])
    new = rebuilt(model, dataclasses.replace(model.spec, **changed, adapters_only=freeze))
    for name, (_, a, b) in found.items():
        module: Any = new.get_submodule(name)
        module.lora_a, module.lora_b = (nn.Parameter(t.to(module.weight.dtype)) for t in (a, b))
    return new


def _with_linears(layer: LayerSpec, begin: str, found: Mapping[str, tuple[LinearSpec, Any, Any]]) -> LayerSpec:
    """The layer with the described linears at the roles that the names in `found` stand for (`...cross.branch.q` is `cross.q`)."""
    linears = dict(layer.linears)
    for name, (linear, _, _) in found.items():
        if name.startswith(begin):
            branch, _, role = name.removeprefix(begin).split(".")
            linears[f"cross.{role}" if branch == "cross" else role] = linear
    return dataclasses.replace(layer, linears=linears)


def preview_load(spec: ModelSpec, *, folder: str, freeze: bool = True, **_: Any) -> ModelSpec:
    """A model's description behind `load_lora`, as far as it can be known from the folder's settings."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise BadInput(f"there is no adapter in {folder} (no adapter_config.json)")
    return dataclasses.replace(spec, adapters_only=freeze)


def merge_lora(model: Model) -> Model:
    """`merge`, under the name it had when LoRA was the only kind."""
    return merge(model)


def preview_lora(
    spec: ModelSpec, *, rank: int, alpha: float | None, dropout: float, targets: Sequence[Role], freeze: bool, **_: Any
) -> ModelSpec:
    """What `lora` makes of a model's description."""
    plain = LinearSpec("lora", rank=rank, alpha=alpha, dropout=dropout)
    over = {"nf4": "qlora", "packed": "packed-lora"}

    def over_what(old: LinearSpec | None) -> LinearSpec:
        packed = old is not None and old.kind in over
        return dataclasses.replace(old, kind=over[old.kind], rank=rank, alpha=alpha, dropout=dropout) if packed and old else plain

    def attach(layer: LayerSpec) -> LayerSpec:
        if any(s.kind in ("lora", *over.values()) for s in layer.linears.values()):
            raise BadInput("this model has LoRA already: merge it first (edit: merge-lora)")
        there = [t for t in targets if (t != "gate" or layer.gated) and (not t.startswith("cross.") or layer.cross)]
        if not there:
            raise BadInput(f"no layer has a linear called {' or '.join(targets)}")
        return dataclasses.replace(layer, linears={**layer.linears, **{t: over_what(layer.linears.get(t)) for t in there}})

    return dataclasses.replace(with_layers(spec, attach, "lora"), adapters_only=freeze)
