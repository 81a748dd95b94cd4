"""How large the activations of single neurons are: of the residual stream, of heads, of the feed-forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model
from layerwise.stack.record import inputs_of, record


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
    read: dict[tuple[str, int], nn.Module] = {("heads", i): layer.mixer.branch.o for i, layer in enumerate(model.stack.layers)}
    read |= {("ffn", i): layer.ffn.branch.down for i, layer in enumerate(model.stack.layers)}
    sums: dict[tuple[str, int], Tensor] = {}

    def add(key: tuple[str, int], x: Tensor) -> None:
        sums[key] = sums.get(key, 0) + _summed(x)

    tokens = 0
    with inference(model), inputs_of(read, add):
        for rows in batches(split_of(data, split), batch, -(-samples // batch), model.device):
            for boundary in record(model, rows, hidden="all", inputs=[0]).stream():
                stream += _summed(boundary)
            tokens += rows["input_ids"].numel()
    groups = [sums["heads", i].reshape(layer.spec.kv_heads, -1).mean(dim=1) / tokens for i, layer in enumerate(model.stack.layers)]
    return Importance(stream / (tokens * (depth + 1)), groups, [sums["ffn", i] / tokens for i in range(depth)])


def input_magnitudes(
    model: Model, modules: Mapping[str, nn.Module], some: Iterable[Mapping[str, Tensor]]
) -> dict[str, Float[Tensor, " in"]]:
    """The mean absolute value of every input of some modules, over the positions of batches of rows that are no padding."""
    sums: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def add(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, 0) + _summed(x if mask is None or mask.shape != x.shape[:2] else x * mask[..., None])

    count = torch.zeros((), dtype=torch.float64, device=model.device)
    with inference(model), inputs_of(modules, add):
        for rows in some:
            mask = rows.get("attention_mask")
            count += rows["input_ids"].numel() if mask is None else mask.sum()
            model(rows)
    return {name: total / count for name, total in sums.items()}


def _summed(x: Float[Tensor, "*n width"]) -> Float[Tensor, " width"]:
    return x.detach().double().abs().flatten(0, -2).sum(dim=0)
