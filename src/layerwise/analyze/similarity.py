"""How far the residual stream turns between layers: the angular distance that tells which block of layers does least."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.analyze.findings import Cell, Findings, Matrix, Table
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model
from layerwise.stack.record import record


def angle(a: Float[Tensor, "... width"], b: Float[Tensor, "... width"]) -> Float[Tensor, ...]:
    """(1/pi) arccos of the cosine between two vectors, in [0, 1]: 0 same direction, 0.5 orthogonal, 1 opposite.

    Computed in float64 from the sum and difference of the unit vectors, which stays exact where arccos would lose all
    digits (nearly parallel vectors) and never leaves its domain.
    """
    a, b = (v.double() / v.double().norm(dim=-1, keepdim=True).clamp(min=1e-300) for v in (a, b))
    return 2 / math.pi * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def distances(
    model: Model, data: Any, *, split: str = "train", samples: int = 256, batch: int = 16
) -> Float[Tensor, "boundaries boundaries"]:
    """Mean angular distance d(l, m) between the stream entering layer l and that entering layer m, at each row's last real token (an image's class token).

    Boundary 0 is the embedding's output, boundary `depth` the last layer's output before the final norm; the matrix is
    symmetric with zero diagonal, (depth + 1, depth + 1), float64.
    Source: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers", equation 7 (arXiv 2403.17887).
    """
    depth = model.stack.depth
    first = getattr(model.spec.embedding, "class_token", False)
    total = torch.zeros(depth + 1, depth + 1, dtype=torch.float64)
    seen = 0
    with inference(model):
        for rows in batches(split_of(data, split), batch, -(-samples // batch), model.device):
            whole = record(model, rows, hidden="all", inputs=[0]).stream()
            stream = torch.stack([x[:, 0] if first else _last(x, rows.get("attention_mask")) for x in whole])
            total += angle(stream[:, None], stream[None, :]).sum(dim=-1).cpu()
            seen += stream.shape[1]
    return total / max(seen, 1)


def block_distances(matrix: Float[Tensor, "n n"], count: int) -> list[float]:
    """d(l, l + count) for every block of `count` layers that could go: depth - count + 1 candidates, l = 0 first."""
    return torch.diagonal(matrix, offset=count).tolist()


def best_block(matrix: Float[Tensor, "n n"], count: int) -> int:
    """First layer of the block of `count` layers over which the stream turns least (the first such block on ties)."""
    candidates = block_distances(matrix, count)
    return min(range(len(candidates)), key=candidates.__getitem__)


def angular_distance(model: Model, data: Any, *, split: str = "train", samples: int = 256, batch: int = 16) -> Findings:
    """Angular distances between all boundaries, and for every block length the block that does least.

    Metrics: `angular_distance_mean` over single layers, `angular_distance_deep` over the last third of them.
    """
    matrix = distances(model, data, split=split, samples=samples, batch=batch)
    depth = len(matrix) - 1
    single = block_distances(matrix, 1)
    rows: list[list[Cell]] = [[i, d] for i, d in enumerate(single)]
    blocks: list[list[Cell]] = [[n, best_block(matrix, n), min(block_distances(matrix, n))] for n in range(1, depth)]
    deep = single[-max(1, depth // 3) :]
    found = Findings({"angular_distance_mean": sum(single) / max(depth, 1), "angular_distance_deep": sum(deep) / len(deep)})
    found.tables.append(Table("Angular distance over each layer", ["layer", "angular distance"], rows))
    found.tables.append(Table("Block that turns the stream least", ["layers dropped", "first layer", "angular distance"], blocks))
    values: list[list[float | None]] = [
        [matrix[i, i + n].item() if i + n <= depth else None for i in range(depth)] for n in range(1, depth + 1)
    ]
    found.matrices.append(
        Matrix("Angular distance of a block", "first layer", "layers", list(range(depth)), list(range(1, depth + 1)), values)
    )
    return found


def _last(x: Float[Tensor, "b s width"], mask: Tensor | None) -> Float[Tensor, "b width"]:
    if mask is None:
        return x[:, -1]
    order = torch.arange(x.shape[1], device=x.device) * mask
    return x[torch.arange(len(x), device=x.device), order.argmax(dim=1)]
