"""How a model keeps the keys and values of earlier positions while it decodes: thin features, the newest ones only, or the most attended."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.analyze.importance import input_magnitudes
from layerwise.edit.linears import with_layers
from layerwise.edit.quantization.engine import calibration_rows
from layerwise.errors import BadInput
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec
from layerwise.nn.attention import Attention
from layerwise.nn.linears.factors import activation_scales, svd_factors
from layerwise.nn.linears.shrunk import Shrunk
from layerwise.stack.parts_spec import CacheSpec, LinearSpec
from layerwise.stack.spec import LayerSpec

Start = Literal["asvd", "svd", "random"]


def shrink_cache(
    model: Model,
    data: Any = None,
    *,
    density: float = 0.2,
    key_share: float = 0.5,
    start: Start = "asvd",
    window: int = 32,
    sliding: bool = False,
    bits: int | None = None,
    group: int | None = None,
    samples: int = 64,
    batch: int = 8,
    split: str = "train",
    seed: int | None = None,
) -> Model:
    """The model with thin features in place of old keys and values in its cache. What it computes without a cache, and of a prompt, stays.

    The factors that make the features begin as a decomposition of the matrices of keys and values, all heads together; the objective
    `cache-reconstruction` trains them.

    Args:
        density: share of the numbers of a cache that is kept, 0.2 for "80 % compression".
        key_share: of these, those of keys; 2 density key_share and 2 density (1 - key_share) are the densities of keys and of values.
            A density rho becomes the rank int(rho head_dim) kv_heads (but no more than the model's width).
        start: `svd`; `asvd`, which weighs inputs by the square root of their mean magnitude in the calibration rows; or `random`.
        window, sliding, bits, group: see `layerwise.stack.parts_spec.CacheSpec`.
        samples, batch, split: calibration rows of asvd. seed: of their choice, and of random factors.

    Source: Wang et al. 2024, "CSKV", section 3 (arXiv 2409.10593), and the published code; ASVD from Yuan et al. 2023 (arXiv 2312.05821).
    """
    options: dict[str, Any] = {
        "density": density,
        "key_share": key_share,
        "window": window,
        "sliding": sliding,
        "bits": bits,
        "group": group,
    }
    new = rebuilt(model, preview_shrink(model.spec, **options))
    if start == "asvd" and data is None:
        raise BadInput("start: asvd looks at what the matrices read: give data, or set start to svd")
    scales = _input_scales(model, data, samples, batch, split, seed or 0) if start == "asvd" else {}
    generator = torch.Generator(device=model.device).manual_seed(seed or 0)
    for name, module in new.named_modules():
        if not isinstance(module, Shrunk):
            continue
        if start == "random":
            module.reset_factors(generator)
        else:
            module.take_factors(*svd_factors(module.weight, module.rank, scales.get(name.rpartition(".")[0])))
    return new


def preview_shrink(
    spec: ModelSpec,
    *,
    density: float,
    key_share: float,
    window: int,
    sliding: bool = False,
    bits: int | None = None,
    group: int | None = None,
    **_: Any,
) -> ModelSpec:
    """What `shrink_cache` makes of a model's description."""
    if not (0 < density <= 1 and 0 < key_share < 1):
        raise BadInput(f"density is in (0, 1] and key_share in (0, 1); got {density} and {key_share}")
    each = {"k": 2 * density * key_share, "v": 2 * density * (1 - key_share)}
    if max(each.values()) > 1 + 1e-9:
        raise BadInput(
            f"keys would have density {each['k']:.3g} and values {each['v']:.3g}; both are 1 at most: change density or key_share"
        )
    cache = CacheSpec("low-rank", window=window, sliding=sliding, bits=bits, group=group)

    def shrunk(layer: LayerSpec) -> LayerSpec:
        head, kv = layer.head_dim or 1, layer.kv_heads or 1
        linears = dict(layer.linears)
        for role, share in each.items():
            if (old := linears.get(role)) is not None and old.kind != "dense":
                raise BadInput(f"linears {role} are of kind {old.kind}; dense ones are shrunk: merge them first (edit: merge)")
            rank = min(int(share * head + 1e-9) * kv, layer.width or 1)
            if not rank:
                raise BadInput(f"a density of {share:.3g} gives {'keys' if role == 'k' else 'values'} rank 0; heads have {head} channels")
            linears[role] = LinearSpec("shrunk", rank=rank)
        return dataclasses.replace(layer, linears=linears, cache=cache)

    return _with_caches(spec, shrunk, "shrink-cache")


def evict_cache(model: Model, *, kind: Literal["recent", "heavy"] = "recent", window: int = 32, sinks: int = 4, heavy: int = 32) -> Model:
    """The model with a cache that keeps some positions and lets go of the others.

    Args:
        kind: `recent` keeps the first `sinks` positions and the newest `window` (Xiao et al. 2023, "StreamingLLM"); `heavy` keeps, for
            every head, the `heavy` most attended positions and the newest `window` (Zhang et al. 2023, "H2O"). A layer that only looks
            through a window keeps as many of the newest instead.
    """
    return rebuilt(model, preview_evict(model.spec, kind=kind, window=window, sinks=sinks, heavy=heavy))


def preview_evict(spec: ModelSpec, *, kind: Literal["recent", "heavy"], window: int, sinks: int, heavy: int, **_: Any) -> ModelSpec:
    """What `evict_cache` makes of a model's description."""
    chosen = CacheSpec(kind, window=window, sinks=sinks, heavy=heavy)
    newest = CacheSpec("recent", window=window + heavy, sinks=0)

    def evicting(layer: LayerSpec) -> LayerSpec:
        return dataclasses.replace(layer, cache=newest if kind == "heavy" and layer.window is not None else chosen)

    return _with_caches(spec, evicting, "evict-cache")


def quantize_cache(model: Model, *, bits: int = 4, group: int | None = None) -> Model:
    """The model with the thin features of its cache rounded to `bits`: what is left of training them that knew nothing of it."""
    return rebuilt(model, preview_quantize_cache(model.spec, bits=bits, group=group))


def preview_quantize_cache(spec: ModelSpec, *, bits: int, group: int | None = None, **_: Any) -> ModelSpec:
    """What `quantize_cache` makes of a model's description."""

    def rounded(layer: LayerSpec) -> LayerSpec:
        if layer.cache is None or layer.cache.kind != "low-rank":
            raise BadInput("quantize-cache rounds thin features: make them first (edit: shrink-cache)")
        return dataclasses.replace(layer, cache=dataclasses.replace(layer.cache, bits=bits, group=group))

    return with_layers(spec, rounded, "quantize-cache")


def widen_cache(model: Model) -> Model:
    """The model with W' = B A as its matrices of keys and values: what thin features give back, for every position, in an ordinary model.

    It needs no cache of its own kind, so it is saved and exported like any other (`export` with format `hf`). It reads its own positions
    and a prompt through W' too, which a thin cache reads exactly; shrunk again by `svd` at the same ranks, it loses nothing.
    """
    new = rebuilt(model, preview_widen_cache(model.spec))
    for name, module in model.named_modules():
        if isinstance(module, Shrunk):
            owner, _, leaf = name.rpartition(".")
            dense = module.merge()
            dense.weight = torch.nn.Parameter((module.factor_b @ module.factor_a).detach())
            setattr(new.get_submodule(owner), leaf, dense)
    return new.train(model.training)


def preview_widen_cache(spec: ModelSpec, **_: Any) -> ModelSpec:
    """What `widen_cache` makes of a model's description."""

    def widened(layer: LayerSpec) -> LayerSpec:
        if layer.cache is None or layer.cache.kind != "low-rank":
            raise BadInput("widen-cache multiplies the factors of thin features out: make them first (edit: shrink-cache)")
        rest = {role: linear for role, linear in layer.linears.items() if linear.kind != "shrunk"}
        return dataclasses.replace(layer, linears=rest, cache=None)

    return with_layers(spec, widened, "widen-cache")


def _with_caches(spec: ModelSpec, change: Any, what: str) -> ModelSpec:
    """`spec` with the caches of its layers changed.

    Raises:
        BadInput: the model decodes nothing, or has a cache of some kind already.
    """
    if spec.decoder is not None:
        raise BadInput(f"{what} is for decoders; this model is an encoder-decoder, whose decoder also keeps what it read of the encoder")
    if not spec.causal:
        raise BadInput(f"{what} needs causal layers: this model continues no text, so it keeps no keys and values")

    def changed(layer: LayerSpec) -> LayerSpec:
        if layer.cache is not None:
            raise BadInput(f"this model keeps a cache of kind {layer.cache.kind} already: {what} begins with one that keeps everything")
        if layer.mixer != "attention":
            raise BadInput(f"{what} needs layers of kind attention; these are {layer.mixer}")
        return change(layer)

    return with_layers(spec, changed, what)


def _input_scales(model: Model, data: Any, samples: int, batch: int, split: str, seed: int) -> dict[str, Tensor]:
    """How much each input of every attention counts, by the attention's name: from its mean magnitude over calibration rows."""
    read = {name: m.k for name, m in model.named_modules() if isinstance(m, Attention)}
    found = input_magnitudes(model, read, calibration_rows(data, samples, batch, split, 1, seed, model.device))
    return {name: activation_scales(size) for name, size in found.items()}
