"""Export in the format that GPTQ checkpoints have: whole numbers packed into 32-bit words beside their scales and zeros."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.models.hf.family import Pair
from layerwise.models.hf.folder import export_hf, pairs_of
from layerwise.models.hf.layouts import TURNED
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec
from layerwise.nn.linears.quantized import Integers, Quantized
from layerwise.nn.packing import pack
from layerwise.stack.spec import StackSpec

WORD = 32


def export_gptq(
    model: Model, folder: str | Path, *, tokenizer: Any = None, dtype: torch.dtype | None = None, max_length: int | None = None
) -> Path:
    """Write a model with packed matrices as `gptqmodel`, and `transformers` with it, read them.

    A matrix becomes `qweight` (in / 32 * bits, out), `qzeros` (groups, out / 32 * bits), `scales` (groups, out) in float16 and `g_idx` (in,), the
    group of each input. On symmetric grids zeros are stored less one, as the first version of the format wants it; on others the second
    version is written, as the first cannot hold a zero of 0 and readers refuse it. Layers of other widths, or that are not quantized, are named under `dynamic`.

    Raises:
        BadInput: no matrix is packed, one is packed otherwise, or its shape does not fill 32-bit words.
    """
    packed = {f"{name}.weight": m.base for name, m in model.named_modules() if isinstance(m, Quantized)}
    dense = rebuilt(model, preview_gptq(model.spec))
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            owner, _, leaf = name.rpartition(".")
            setattr(dense.get_submodule(owner), leaf, module.merge())
    family, pairs = pairs_of(dense)
    theirs = {}
    for pair in pairs:
        bases = [packed[name] for name in pair.ours if name in packed]
        if bases and len(bases) < len(pair.ours):
            raise BadInput(f"{pair.theirs} is one matrix in a checkpoint of the family {family.name}; here only a part of it is packed")
        if bases:
            theirs[pair.theirs] = (pair, bases)
    matrices = [pair.theirs for pair in pairs if all(".branch." in name and name.endswith(".weight") for name in pair.ours)]
    stack: Any = model.spec.stack
    group = next(s.group for layer in stack.layers for s in layer.linears.values() if s.kind == "packed")
    second = any(bool((base.grid().zeros != 2 ** (base.bits - 1)).any()) for base in packed.values())

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name, (pair, bases) in theirs.items():
            written = name if name in tensors else name.removeprefix(family.prefix)
            del tensors[written]
            prefix = written.removesuffix("weight")
            tensors |= {prefix + part: tensor for part, tensor in words(pair, bases, second=second).items()}
        config["quantization_config"] = _settings(matrices, {name: bases[0] for name, (_, bases) in theirs.items()}, group, second=second)

    return export_hf(dense, folder, tokenizer=tokenizer, dtype=dtype, max_length=max_length, change=change)


def preview_gptq(spec: ModelSpec) -> ModelSpec:
    """The description of the dense model that a packed one stands for.

    Raises:
        BadInput: as `export_gptq` does, as far as the description tells.
    """
    stack = spec.stack
    if not isinstance(stack, StackSpec) or spec.decoder is not None:
        raise BadInput("the GPTQ format is written for one stack of transformer layers")
    kinds = {s.kind for layer in stack.layers for s in layer.linears.values()} - {"dense"}
    if kinds != {"packed"}:
        raise BadInput(
            f"the GPTQ format holds linears of kind packed (edit: quantize); this model has {', '.join(sorted(kinds)) or 'dense ones'}"
        )
    groups = {s.group for layer in stack.layers for s in layer.linears.values() if s.kind == "packed"}
    if len(groups) > 1:
        raise BadInput("the GPTQ format has one group size; this model has several")
    for i, layer in enumerate(stack.layers):
        heads = (layer.heads * (layer.head_dim or 1), (layer.kv_heads or 1) * (layer.head_dim or 1))
        sizes = (layer.width or 1, layer.ffn_width or 1, *heads)
        for role, linear in layer.linears.items():
            inner = layer.ffn_width if role == "down" else heads[0] if role == "o" else layer.width
            if linear.kind == "packed" and (any(n % WORD for n in sizes) or (inner or 1) % (linear.group or 1)):
                raise BadInput(
                    f"the GPTQ format needs sizes that are multiples of {WORD} and of the group; layer {i} has {sizes}, groups of {linear.group}"
                )
    return dataclasses.replace(spec, stack=stack.with_layers([dataclasses.replace(layer, linears={}) for layer in stack.layers]))


def words(pair: Pair, bases: list[Integers], *, second: bool = False) -> dict[str, Tensor]:
    """One matrix of theirs in the format; several of ours may make it up. `second`: zeros as they are (its second version).

    Raises:
        BadInput: ours differ in what the format has once.
    """
    first = bases[0]
    inner = first.shape[1]
    of = [torch.arange(inner) // base.group if base.of is None else base.of.cpu() for base in bases]
    if any((base.bits, base.group) != (first.bits, first.group) or not torch.equal(o, of[0]) for base, o in zip(bases, of, strict=True)):
        raise BadInput(f"{pair.theirs} is one matrix in a checkpoint; here its parts differ in bits or groups")

    def joined(parts: list[Tensor]) -> Tensor:  # rows of ours to rows of theirs, whatever stands in them
        made = pair.layout.pack(parts, pair.heads)
        return made.t() if pair.layout is TURNED else made

    codes = joined([base.codes.view(base.shape[0], -1) for base in bases]).contiguous().view(torch.int32)
    zeros = joined([base.grid().zeros.to(torch.uint8) for base in bases]).t()
    return {
        "qweight": codes.t().contiguous(),
        "qzeros": in_words(zeros if second else zeros - 1, first.bits),
        "scales": joined([base.scales.half() for base in bases]).t().contiguous(),
        "g_idx": of[0].to(torch.int32),
    }


def in_words(codes: UInt8[Tensor, "rows n"], bits: int) -> Int32[Tensor, "rows words"]:
    """Every row's numbers one after another, lowest bits first, in 32-bit words."""
    return pack(codes.contiguous(), bits).view(len(codes), -1).contiguous().view(torch.int32)


def _settings(names: list[str], packed: dict[str, Integers], group: int | None, *, second: bool) -> dict[str, Any]:
    """The quantization_config. `names`: of all matrices of layers, `packed`: of those that are."""
    kinds = {name: packed[name].bits if name in packed else 16 for name in names}
    common = Counter(bits for bits in kinds.values() if bits != 16).most_common(1)[0][0]
    layers: dict[str, list[str]] = {}
    for name in names:
        found = re.search(r"([^.]+)\.(\d+)\.", name)
        assert found is not None
        layers.setdefault(f"{found[1]}\\.{found[2]}\\.", []).append(name)
    dynamic: dict[str, dict[str, int]] = {}
    for layer, inside in layers.items():
        alike = len({kinds[name] for name in inside}) == 1
        each = {f".*{layer}.*": inside[0]} if alike else {re.escape(name.removesuffix(".weight")) + "$": name for name in inside}
        for pattern, name in each.items():
            if kinds[name] == 16:
                dynamic[f"-:{pattern}"] = {}
            elif kinds[name] != common:
                dynamic[f"+:{pattern}"] = {"bits": kinds[name]}
    return {
        "quant_method": "gptq", "bits": common, "group_size": group or -1,
        "desc_act": any(base.of is not None for base in packed.values()), "sym": not second, "true_sequential": True,
        "lm_head": False, "checkpoint_format": "gptq_v2" if second else "gptq", **({"dynamic": dynamic} if dynamic else {}),
    }  # fmt: skip
