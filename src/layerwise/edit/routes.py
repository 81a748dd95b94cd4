"""Layers that a prompt decides about: routers attached, their threshold set for a share of skipped layers, and taken away again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from layerwise.errors import BadInput
from layerwise.evaluate.batches import split_of
from layerwise.infer.routes import decisions, routed_layers
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec
from layerwise.stack.parts_spec import RouterSpec
from layerwise.stack.spec import LayerSpec, StackSpec, indices
from layerwise.stack.surgery import keep

STEPS = 16
"""Halvings of the interval that holds the threshold."""


def route_layers(
    model: Model,
    *,
    layers: Sequence[str | int] = ("1:-1",),
    bias: float = 1.0,
    threshold: float = 0.5,
    temperature: float = 1.0,
    full_prefill: bool = False,
) -> Model:
    """The model with a router on each of `layers`, untrained: as long as sigmoid(bias / temperature) is above the threshold it computes what it did.

    Args:
        layers: indices or slices; all others always run. The default protects the first and the last.
        bias, threshold, temperature, full_prefill: see `RouterSpec`.

    Source: Jain et al. 2024, "FiRST" (arXiv 2410.12513), see `layerwise.nn.sequence_router`.
    """
    options = {"bias": bias, "threshold": threshold, "temperature": temperature, "full_prefill": full_prefill}
    new = rebuilt(model, preview_route(model.spec, layers=layers, **options))
    for layer in new.stack.layers:
        if layer.router is not None:
            layer.router.to_empty(device=model.device).to(model.token_matrix.dtype)
            layer.router.initialize()
    return new


def preview_route(spec: ModelSpec, *, layers: Sequence[str | int] = ("1:-1",), **options: Any) -> ModelSpec:
    """What `route_layers` makes of a model's description."""
    if not isinstance(spec.stack, StackSpec) or spec.decoder is not None:
        raise BadInput("route-layers needs one stack of transformer layers; an encoder-decoder's texts have no prompt before them")
    depth = spec.stack.depth
    chosen = {i for key in layers for i in indices(key, depth)}
    if any(layer.router is not None for layer in spec.stack.layers):
        raise BadInput("this model has routers already")
    router = RouterSpec("layer", **options)
    return _with_routers(spec, lambda i, layer: router if i in chosen else None)


def calibrate_routes(model: Model, data: Any, *, skip: float, split: str = "train", samples: int = 256, seed: int | None = None) -> Model:
    """The routed model with the threshold at which prompts skip the share `skip` of all layers (protected ones count), on average.

    A layer that is skipped changes what the routers above see, so the threshold is found by running: of 16 halvings the one whose
    share is nearest.

    Args:
        samples: rows of `split` to look at, drawn with `seed`.
    """
    preview_calibrate(model.spec, skip=skip)
    rows = split_of(data, split)
    index = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed or 0))[:samples]
    batch = {name: value.to(model.device) for name, value in rows.batch(index.sort().values).items()}
    low, high = 0.0, 1.0
    best: tuple[float, Model] | None = None
    for _ in range(STEPS):
        middle = (low + high) / 2
        tried = rebuilt(model, _with_threshold(model.spec, middle))
        share = 1 - decisions(tried, batch).float().mean().item()
        if best is None or abs(share - skip) < best[0]:
            best = abs(share - skip), tried
        low, high = (middle, high) if share < skip else (low, middle)
    assert best is not None
    return best[1]


def preview_calibrate(spec: ModelSpec, *, skip: float, **_: Any) -> ModelSpec:
    """What `calibrate_routes` makes of a model's description: another threshold, which only the data tells."""
    routed = routed_layers(spec, "calibrate-routes")
    most = len(routed) / spec.stack.depth
    if not 0 <= skip <= most:
        raise BadInput(
            f"skip is a share of all layers, 0 to {most:.3g} where {len(routed)} of {spec.stack.depth} have a router; it is {skip}"
        )
    return spec


def settle_routes(model: Model, data: Any, *, split: str = "train", samples: int = 256) -> Model:
    """The plain model of the layers that prompts run, if all prompts run the same: no routers, nothing to decide, and an export for others.

    Raises:
        BadInput: prompts differ in a layer; the message says in which and how many.
    """
    preview_settle(model.spec)
    rows = split_of(data, split)
    batch = {name: value.to(model.device) for name, value in rows.batch(torch.arange(min(samples, len(rows)))).items()}
    shares = decisions(model, batch).float().mean(dim=0).tolist()
    if unsettled := [i for i, share in enumerate(shares) if 0 < share < 1]:
        i = unsettled[0]
        raise BadInput(
            f"settle-routes: {shares[i]:.1%} of {len(batch['input_ids'])} prompts run layer {i} and the others skip it, so no fixed set of layers "
            "computes the same: keep the routers (export with format layerwise), or set a threshold that all prompts agree on"
        )
    plain = rebuilt(model, _with_routers(model.spec, lambda i, layer: None))
    return plain.with_stack(keep(plain.stack, [i for i, share in enumerate(shares) if share]))


def preview_settle(spec: ModelSpec, **_: Any) -> ModelSpec:
    """What `settle_routes` makes of a model's description, if no layer is skipped."""
    routed_layers(spec, "settle-routes")
    if any(layer.router is not None and layer.router.full_prefill for layer in spec.stack.layers):  # type: ignore[union-attr]
        raise BadInput("settle-routes: with full_prefill every layer reads the prompt, so none can be left out")
    return _with_routers(spec, lambda i, layer: None)


def _with_threshold(spec: ModelSpec, threshold: float) -> ModelSpec:
    def changed(i: int, layer: LayerSpec) -> RouterSpec | None:
        return None if layer.router is None else dataclasses.replace(layer.router, threshold=threshold)

    return _with_routers(spec, changed)


def _with_routers(spec: ModelSpec, router: Callable[[int, LayerSpec], RouterSpec | None]) -> ModelSpec:
    stack: Any = spec.stack
    layers = [dataclasses.replace(layer, router=router(i, layer)) for i, layer in enumerate(stack.layers)]
    return dataclasses.replace(spec, stack=stack.with_layers(layers))
