"""How large the activations of single neurons are: of the residual stream, of heads, of the feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model
from layerwise.stack.record import record


@dataclass
class Importance:
    """Mean absolute activation over the tokens of a sample.

    Attributes:
        stream: (width,) of the residual stream, averaged over all boundaries between layers. One ordering serves them all, because
            large neurons stay large along the residual connections.
        groups: for each layer (kv_heads,) of what the heads that share a key/value head write, before the output matrix.
        ffn: for each layer (ffn_width,) of what the feed-forward's output matrix multiplies.
    """

    stream: Float[Tensor, " width"]
    groups: list[Float[Tensor, " kv"]]
    ffn: list[Float[Tensor, " ffn"]]


def neuron_importance(model: Model, data: Any, *, samples: int = 64, split: str = "train", batch: int = 16) -> Importance:
    """Importance of all neurons on the first `samples` rows (spread evenly) of a split.

    Source: Samragh et al. 2023, "Weight subcloning" (arXiv 2312.09299), section 3.1; for heads the same measure, which the paper
    leaves open.
    """
    depth = model.stack.depth
    stream = torch.zeros(model.stack.spec.width, dtype=torch.float64, device=model.device)
    inner: list[dict[str, Tensor]] = [{} for _ in range(depth)]

    def add(i: int, name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        size = given[0].detach().double().abs().flatten(0, -2).sum(dim=0)
        inner[i][name] = inner[i].get(name, 0) + size

    hooks = []
    for i, layer in enumerate(model.stack.layers):
        hooks.append(layer.mixer.branch.o.register_forward_pre_hook(partial(add, i, "heads")))
        hooks.append(layer.ffn.branch.down.register_forward_pre_hook(partial(add, i, "ffn")))
    try:
        with inference(model):
            tokens = 0
            for rows in batches(split_of(data, split), batch, -(-samples // batch), model.device):
                boundaries = record(model, rows, hidden="all", inputs=[0]).stream()
                for boundary in boundaries:
                    stream += boundary.double().abs().flatten(0, -2).sum(dim=0)
                tokens += boundaries[0].shape[:-1].numel()
    finally:
        for hook in hooks:
            hook.remove()
    groups = [
        part["heads"].reshape(layer.spec.kv_heads, -1).mean(dim=1) / tokens for part, layer in zip(inner, model.stack.layers, strict=True)
    ]
    return Importance(stream / (tokens * (depth + 1)), groups, [part["ffn"] / tokens for part in inner])
