"""Cutting a model's widths to chosen channels, consistently in every tensor that runs along them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

Axis = Literal["stream", "heads", "queries", "groups", "ffn"] | None
"""What an axis of a tensor runs along: the residual stream; all numbers of the query heads, one a query head, all numbers of the
key/value heads; the feed-forward's inner channels; or something that is never cut."""

_NORMS: dict[str, tuple[Axis, ...]] = {
    f"{name}.{part}": ("stream",) for name in ("norm", "norm_out", "residual") for part in ("weight", "bias")
}
BRANCH: dict[str, tuple[Axis, ...]] = {**_NORMS, "scale": ("stream",)}
MIXER: dict[str, tuple[Axis, ...]] = {
    "q.weight": ("heads", "stream"), "q.bias": ("heads",), "k.weight": ("groups", "stream"), "k.bias": ("groups",),
    "v.weight": ("groups", "stream"), "v.bias": ("groups",), "o.weight": ("stream", "heads"), "o.bias": ("stream",),
    "q_norm.weight": (None,), "k_norm.weight": (None,), "head_scale.weight": ("queries",),
}  # fmt: skip
FFN: dict[str, tuple[Axis, ...]] = {
    "gate.weight": ("ffn", "stream"), "gate.bias": ("ffn",), "up.weight": ("ffn", "stream"), "up.bias": ("ffn",),
    "norm.weight": ("ffn",), "norm.bias": ("ffn",), "down.weight": ("stream", "ffn"), "down.bias": ("stream",),
}  # fmt: skip
LAYER: dict[str, tuple[Axis, ...]] = {
    **{f"{branch}.{name}": axes for branch in ("mixer", "ffn") for name, axes in BRANCH.items()},
    **{f"mixer.branch.{name}": axes for name, axes in MIXER.items()},
    **{f"ffn.branch.{name}": axes for name, axes in FFN.items()},
    "router.weight": ("stream",),
    "router.bias": (),
    "router.capacity": (),
}
OUTSIDE: dict[str, tuple[Axis, ...]] = {
    "embedding.tokens.weight": (None, "stream"), "embedding.positions.weight": (None, "stream"), "embedding.types.weight": (None, "stream"),
    "embedding.norm.weight": ("stream",), "embedding.norm.bias": ("stream",), "stack.norm.weight": ("stream",), "stack.norm.bias": ("stream",),
    "head.weight": (None, "stream"), "head.bias": (None,), "head.out.weight": (None, "stream"), "head.out.bias": (None,),
}  # fmt: skip
"""Every tensor's axes, by its name in a layer and outside of layers."""

_TABLES = ("embedding.tokens.weight", "embedding.positions.weight", "embedding.types.weight")


def cut_width(
    model: Model,
    *,
    stream: Sequence[int] | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    ffn: Sequence[Sequence[int]] | None = None,
    rescale: bool = False,
) -> Model:
    """The model with the named channels only, in the order given; the given model shares nothing with it and stays as it is.

    Choosing all channels in another order is a permutation, which changes no output. Dropping channels that are zero changes none
    either, except that norms over the stream divide by the root of a mean over fewer channels.

    Args:
        stream: channels of the residual stream, the same everywhere. None keeps all.
        groups: for each layer the key/value heads to keep, each with the query heads that share it; heads stay whole, so that
            rotary pairs stay together. None keeps all.
        ffn: for each layer the inner channels of the feed-forward. None keeps all.
        rescale: multiply every matrix whose input was cut from n to m channels by sqrt(n / m), which keeps the spread of what it
            gives; biases and embeddings are not multiplied. Source: Samragh et al. 2023, "Weight subcloning" (arXiv 2312.09299).

    Raises:
        BadInput: a channel that is not there, or a part whose axes are not known here.
    """
    counts = [None if c is None else [len(one) for one in c] for c in (groups, ffn)]
    spec = cut_spec(model.spec, None if stream is None else len(stream), counts[0], counts[1], tied_scale=rescale)
    specs: Any = model.spec.stack.layers
    with torch.device("meta"):
        new = Model(spec)
    outer = {"stream": _index(stream, model.spec.stack.width, "stream")}
    inner = [_layer_index(specs[i], i, groups, ffn) for i in range(model.stack.depth)]
    _check_sharing(model.spec.stack, inner)
    made: dict[str, Tensor] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        if name.startswith("stack.layers."):
            _, _, index, inside = name.split(".", 3)
            chosen = {**outer, **inner[int(index)]}
            axes = _axes(inside, LAYER, chosen)
        else:
            chosen = outer
            axes = _axes(name, OUTSIDE, chosen)
        made[name] = _cut(tensor, axes, chosen, rescale and tensor.dim() == 2 and name not in _TABLES)
    new.load_state_dict(made, assign=True)
    trained = dict(model.named_parameters())
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trained[name].requires_grad)
    return new.train(model.training)


def cut_spec(
    spec: ModelSpec,
    width: int | None,
    groups: Sequence[int] | None,
    ffn: Sequence[int] | None,
    *,
    tied_scale: bool = False,
) -> ModelSpec:
    """The description of a model cut to a width, and to so many key/value heads and inner channels a layer (None: all).

    Args:
        tied_scale: a tied head cannot be multiplied, so what it reads is (`HeadSpec.scale`).

    Raises:
        BadInput: more is asked for than there is, or the model has parts that cannot be cut.
    """
    stack, head = spec.stack, spec.head
    if not isinstance(stack, StackSpec) or spec.decoder is not None:
        raise BadInput("widths are cut in models with one stack, of transformer layers")
    for i, layer in enumerate(stack.layers):
        if reason := _obstacle(layer, stream=width is not None, heads=groups is not None):
            raise BadInput(f"layer {i} cannot be cut: {reason}")
    if width is not None:
        _check_outside(spec)
    width = stack.width if width is None else width
    counts = [s.kv_heads or s.heads for s in stack.layers] if groups is None else list(groups)
    inner = [s.ffn_width or 1 for s in stack.layers] if ffn is None else list(ffn)
    if len(counts) != stack.depth or len(inner) != stack.depth:
        raise BadInput(f"groups and ffn are given for each of the {stack.depth} layers; got {len(counts)} and {len(inner)}")
    layers = []
    for i, (old, kv, channels) in enumerate(zip(stack.layers, counts, inner, strict=True)):
        have = old.kv_heads or old.heads
        if not (1 <= width <= stack.width and 1 <= kv <= have and 1 <= channels <= (old.ffn_width or 0)):
            raise BadInput(
                f"layer {i} has width {stack.width}, {have} key/value heads and {old.ffn_width} inner channels; asked for {width}, {kv} and {channels}"
            )
        layers.append(dataclasses.replace(old, width=width, heads=old.heads // have * kv, kv_heads=kv, ffn_width=channels))
    if tied_scale and head is not None and head.tie and width != stack.width:
        head = dataclasses.replace(head, scale=head.scale * (stack.width / width) ** 0.5)
    return dataclasses.replace(spec, stack=dataclasses.replace(stack.with_layers(layers), width=width), head=head)


def _obstacle(layer: LayerSpec, *, stream: bool, heads: bool) -> str | None:
    """Why a layer's stream or heads cannot be cut."""
    other = [k.kind for k in layer.linears.values() if k.kind != "dense"]
    if other:
        return f"its matrices are {other[0]}, and only dense ones are cut (edit: merge)"
    if layer.mixer != "attention":
        return f"its mixer is {layer.mixer}"
    if layer.cross and (stream or heads):
        return "it has cross-attention"
    if heads and layer.position not in ("none", "rotary"):
        return f"position {layer.position} gives each head a bias of its own, so heads stay; cut ffn only"
    if heads and layer.head_scale == "after":
        return "head_scale after ties channels of the stream to heads"
    return f"position {layer.position} has a table" if stream and layer.position not in ("none", "rotary", "alibi") else None


def _check_outside(spec: ModelSpec) -> None:
    """Refuse to cut the stream where it is not known which tensors around the layers run along it."""
    embedding, head = spec.embedding, spec.head
    if not isinstance(embedding, TokenSpec) or embedding.size is not None:
        raise BadInput("the stream's width is cut in models that read tokens without a projection")
    if head is not None and (head.transform is not None or head.size is not None or head.pool_norm is not None):
        raise BadInput("the stream's width is cut under a plain head: without transform, size and pool_norm")


def _check_sharing(stack: Any, inner: Sequence[Mapping[str, Tensor | None]]) -> None:
    """Refuse different choices for layers that have the same weights."""
    for i, first in enumerate(getattr(stack, "shared", ())):
        for axis, index in inner[i].items():
            if index is not None and not torch.equal(index, inner[first][axis]):  # type: ignore[arg-type]
                raise BadInput(f"layers {first} and {i} share their weights, so the same {axis} must be kept in both")


def _axes(name: str, table: Mapping[str, tuple[Axis, ...]], chosen: Mapping[str, Tensor | None]) -> tuple[Axis, ...]:
    """What a tensor runs along; nothing for one whose part of the model is not cut."""
    if name in table:
        return table[name]
    cut = {axis for axis, index in chosen.items() if index is not None}
    if "stream" in cut or (name.startswith("ffn.") and "ffn" in cut) or (name.startswith(("mixer.", "cross.")) and "groups" in cut):
        raise BadInput(f"it is not known which widths the tensor '{name}' runs along, so this model cannot be cut")
    return ()


def _layer_index(
    layer: LayerSpec, i: int, groups: Sequence[Sequence[int]] | None, ffn: Sequence[Sequence[int]] | None
) -> dict[str, Tensor | None]:
    kv, size = layer.kv_heads or layer.heads, layer.head_dim
    assert size is not None
    kept = _index(None if groups is None else groups[i], kv, "groups")
    channels = _index(None if ffn is None else ffn[i], layer.ffn_width or 0, "ffn")
    if kept is None:
        return {"ffn": channels}
    queries = _expanded(kept, layer.heads // kv)
    return {"ffn": channels, "groups": _expanded(kept, size), "queries": queries, "heads": _expanded(queries, size)}


def _expanded(index: Tensor, size: int) -> Tensor:
    """Indices of blocks of `size` -> indices of all that is in them."""
    return (index[:, None] * size + torch.arange(size)).flatten()


def _index(chosen: Sequence[int] | None, count: int, what: str) -> Tensor | None:
    if chosen is None:
        return None
    index = torch.as_tensor(list(chosen), dtype=torch.long)
    if len(index.unique()) != len(index) or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < count):
        raise BadInput(f"{what} names distinct channels 0 to {count - 1}; got {list(chosen)[:12]}")
    return index


def _cut(tensor: Tensor, axes: tuple[Axis, ...], chosen: Mapping[str, Tensor | None], rescale: bool) -> Tensor:
    made = tensor.detach().clone()
    for dim, axis in enumerate(axes):
        index = chosen.get(axis) if axis is not None else None
        if index is not None:
            made = made.index_select(dim, index.to(made.device))
    if rescale and made.shape[1] != tensor.shape[1]:
        made = made * (tensor.shape[1] / made.shape[1]) ** 0.5
    return made
