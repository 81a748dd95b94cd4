"""What the routers of a model decide for each prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.evaluate.batches import inference
from layerwise.models.model import Model
from layerwise.nn.sequence_router import GATING, Gating
from layerwise.stack.spec import StackSpec


def routed_layers(spec: Any, what: str) -> list[int]:
    """The layers whose router decides about the whole layer.

    Raises:
        BadInput: there is none, so `what` has nothing to work on.
    """
    found = _routed(spec)
    if not found:
        raise BadInput(f"{what} needs a model with routers: attach them first (edit: route-layers)")
    return found


def _routed(spec: Any) -> list[int]:
    stack = getattr(spec, "stack", None)
    layers = stack.layers if isinstance(stack, StackSpec) else ()
    return [i for i, layer in enumerate(layers) if layer.router is not None and layer.router.decides == "layer"]


def skipped(spec: Any, skip: float) -> int:
    """How many layers the share `skip` of all is.

    Raises:
        BadInput: there are fewer routers.
    """
    routed, depth = routed_layers(spec, "skip"), spec.stack.depth
    count = round(skip * depth)
    if not 0 <= count <= len(routed):
        raise BadInput(f"skip {skip:g} is {count} of {depth} layers, and {len(routed)} have a router")
    return count


def decisions(model: Model, batch: Mapping[str, Any], *, skip: float | None = None) -> Bool[Tensor, "b depth"]:
    """Which layers each row of `batch` runs; without routers, all.

    Args:
        skip: None: each router goes by its threshold. A share of all layers: every row skips that many, those with the lowest mean rho of
            its prompt in a pass that runs all (hand them on as `Gating.decisions`).

    Raises:
        BadInput: there are fewer routers than layers to skip.
    """
    count = 0 if skip is None else skipped(model.spec, skip)
    if model.causal and "prompt_mask" in batch:  # nothing behind the prompt has a say
        length = int(batch["prompt_mask"].any(dim=0).nonzero().max()) + 1
        batch = {name: batch[name][:, :length] for name in ("input_ids", "attention_mask", "prompt_mask") if name in batch}
    ids = batch["input_ids"]
    made = torch.ones(len(ids), model.stack.depth, dtype=torch.bool, device=ids.device)
    if not _routed(model.spec):
        return made
    gating = Gating(threshold=None if skip is None else -1.0)
    with inference(model):
        model(batch, extras={GATING: gating})
    if skip is not None:
        routed = list(gating.means)
        least = torch.stack([gating.means[i] for i in routed], dim=1).argsort(dim=1, stable=True)[:, :count]
        return made.scatter(1, torch.tensor(routed, device=ids.device)[least], False)
    for i, mean in gating.means.items():
        made[:, i] = mean > model.stack.layers[i].spec.router.threshold
    return made
