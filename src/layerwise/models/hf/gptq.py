"""Export in the format that GPTQ checkpoints have: whole numbers packed into 32-bit words beside their scales and zeros."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.models.hf.folder import export_hf, their_names
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
    group of each input. Zeros are stored less one, as the first version of the format wants it; where a zero is 0, which that cannot
    hold, the second version is written. Layers of other widths, or that are not quantized, are named under `dynamic`.

    Raises:
        BadInput: no matrix is packed, one is packed otherwise, or its shape does not fill 32-bit words.
    """
    packed = {name: m.base for name, m in model.named_modules() if isinstance(m, Quantized)}
    dense = rebuilt(model, preview_gptq(model.spec))
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            owner, _, leaf = name.rpartition(".")
            setattr(dense.get_submodule(owner), leaf, module.merge())
    names = their_names(dense)
    theirs = {names[f"{name}.weight"].removesuffix(".weight"): base for name, base in packed.items()}
    old = any(bool((base.grid().zeros == 0).any()) for base in packed.values())

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        for name, base in theirs.items():
            written = next(n for n in (f"{name}.weight", f"{name}.weight".removeprefix("model.")) if n in tensors)
            if tensors.pop(written).shape != base.shape:
                raise BadInput(f"{written} is laid out differently in this family, so its GPTQ form is not known here")
            prefix = written.removesuffix("weight")
            tensors |= {prefix + part: tensor for part, tensor in words(base, second=old).items()}
        config["quantization_config"] = _settings(model, theirs, second=old)

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


def words(base: Integers, *, second: bool = False) -> dict[str, Tensor]:
    """One matrix in the format. `second`: zeros as they are (its second version)."""
    inner = base.shape[1]
    zeros = base.grid().zeros.to(torch.uint8).t()
    return {
        "qweight": in_words(base.numbers(), base.bits).t().contiguous(),
        "qzeros": in_words(zeros if second else zeros - 1, base.bits),
        "scales": base.scales.t().contiguous(),
        "g_idx": (torch.arange(inner, device=base.codes.device) // base.group).to(torch.int32),
    }


def in_words(codes: UInt8[Tensor, "rows n"], bits: int) -> Int32[Tensor, "rows words"]:
    """Every row's numbers one after another, lowest bits first, in 32-bit words."""
    rows = codes.shape[0]
    return pack(codes.contiguous(), bits).view(rows, -1).contiguous().view(torch.int32)


def _settings(model: nn.Module, theirs: dict[str, Integers], *, second: bool) -> dict[str, Any]:
    spec: Any = model.spec
    bits = {f"layers\\.{i}\\.": next((s.bits for s in layer.linears.values()), 16) for i, layer in enumerate(spec.stack.layers)}
    common = Counter(b for b in bits.values() if b != 16).most_common(1)[0][0]
    other = {f"-:.*{key}.*" if b == 16 else f"+:.*{key}.*": {} if b == 16 else {"bits": b} for key, b in bits.items() if b != common}
    group = next((s.group for layer in spec.stack.layers for s in layer.linears.values()), None)
    symmetric = all(bool((base.grid().zeros == 2 ** (base.bits - 1)).all()) for base in theirs.values())
    return {
        "quant_method": "gptq", "bits": common, "group_size": group or -1, "desc_act": False, "sym": symmetric, "true_sequential": True,
        "lm_head": False, "checkpoint_format": "gptq_v2" if second else "gptq", **({"dynamic": other} if other else {}),
    }  # fmt: skip
