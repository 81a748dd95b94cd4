"""Making an encoder binary, and packing a binary one."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import nn

from layerwise.edit.linears import with_layers
from layerwise.embed.one_bit import OneBitTable, PackedTable
from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.models.heads import Pooler
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec
from layerwise.nn.binarize import Elastic
from layerwise.nn.binary_attention import Estimators
from layerwise.nn.linears.binary import Binary
from layerwise.nn.norms import fill_norm
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import LayerSpec


def binarize(model: Model, *, estimator_rank: int = 1, embedding: bool = True, seed: int | None = None) -> Model:
    """The encoder with one-bit matrices, activations, attention and token vectors, begun from its full-precision weights, which it shares.

    A head stays as it is, but for a classifier's pooler, which is binarized with its norm and its sum (see `HeadSpec.pooler`).

    Args:
        estimator_rank: of the full-precision estimates of what binarization leaves out (0: none).
        embedding: token vectors have one bit a number too; tables of positions and types stay.
        seed: of the estimators.

    Source: Xing et al. 2024, "BiPFT", whose student begins from its teacher's weights.
    """
    new = rebuilt(model, preview_binarize(model.spec, estimator_rank=estimator_rank, embedding=embedding))
    generator = torch.Generator(device=model.device).manual_seed(seed or 0)
    for module in new.modules():
        if isinstance(module, Binary):
            module.shift = nn.Parameter(torch.empty_like(module.shift, device=model.device))
            module.inputs.to_empty(device=model.device)
            module.reset_inputs(generator)
        elif isinstance(module, Elastic | Estimators):
            module.to_empty(device=model.device)
            module.initialize(model.spec.stack.init_std, generator)  # type: ignore[union-attr]
        elif isinstance(module, Pooler) and module.norm is not None:
            module.norm.to_empty(device=model.device)
            fill_norm(module.norm, 1.0)
    return new


def preview_binarize(spec: ModelSpec, *, estimator_rank: int = 1, embedding: bool = True, **_: Any) -> ModelSpec:
    """What `binarize` makes of a model's description."""

    def binary(layer: LayerSpec) -> LayerSpec:
        if any(s.kind != "dense" for s in layer.linears.values()) or layer.mixer != "attention":
            raise BadInput("binarize begins from dense attention layers: merge the linears first (edit: merge)")
        if layer.causal or layer.cross or layer.kv_heads != layer.heads or layer.position not in ("none", "relative"):
            raise BadInput("binarize is for encoders without causal, cross, grouped or rotary attention (preset bert)")
        changed = dataclasses.replace(layer, mixer="binary-attention", estimator_rank=estimator_rank, linears={"*": LinearSpec("binary")})
        return changed.resolve(0, 1, layer.width or 1)

    new = with_layers(spec, binary, "binarize")
    if embedding and isinstance(spec.embedding, TokenSpec) and spec.embedding.table == "learned":
        new = dataclasses.replace(new, embedding=dataclasses.replace(spec.embedding, table="one-bit"))
    return _with_pooler(new, "dense", "binary")


def pack_binary(model: Model) -> Model:
    """The model with its binary matrices and token vectors packed eight numbers to a byte: same outputs, what is packed is frozen.

    Token vectors that a tied head multiplies by stay: it reads them in full precision.
    """
    new = rebuilt(model, preview_pack(model.spec))
    for name, module in model.named_modules():
        target: Any = new.get_submodule(name) if isinstance(module, Binary | OneBitTable) else None
        if isinstance(module, Binary):
            target.take(module)
        elif isinstance(target, PackedTable):
            target.store(module.weight)
    return new


def preview_pack(spec: ModelSpec, **_: Any) -> ModelSpec:
    """What `pack_binary` makes of a model's description."""

    def packed(layer: LayerSpec) -> LayerSpec:
        if not any(s.kind == "binary" for s in layer.linears.values()):
            raise BadInput("pack-binary packs linears of kind binary; this model has none (edit: binarize)")
        linears = {r: dataclasses.replace(s, kind="binary-packed") if s.kind == "binary" else s for r, s in layer.linears.items()}
        return dataclasses.replace(layer, linears=linears)

    new = with_layers(spec, packed, "pack-binary")
    tied = spec.head is not None and spec.head.kind == "lm" and spec.head.tie
    if isinstance(spec.embedding, TokenSpec) and spec.embedding.table == "one-bit" and not tied:
        new = dataclasses.replace(new, embedding=dataclasses.replace(spec.embedding, table="one-bit-packed"))
    return _with_pooler(new, "binary", "binary-packed")


def _with_pooler(spec: ModelSpec, old: str, new: Literal["binary", "binary-packed"]) -> ModelSpec:
    """`spec` with a pooler of another kind, if it has one of kind `old`."""
    if spec.head is None or spec.head.pooler != old:
        return spec
    return dataclasses.replace(spec, head=dataclasses.replace(spec.head, pooler=new))
