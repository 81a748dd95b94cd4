"""How much each layer matters, by many scores beside one another: one table that pruners and allocators of bits read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.analyze.similarity import block_distances, distances
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model
from layerwise.nn.linear import Linear
from layerwise.objectives import OBJECTIVES
from layerwise.stack.depth import depth_of
from layerwise.stack.record import record
from layerwise.table import lookup

Score = Literal["input-modification", "token-modification", "z-score", "absolute-z-score", "angular-distance", "taylor", "gradient-norm"]


def layer_scores(
    model: Model, data: Any, by: str, *, samples: int = 64, split: str = "train", batch: int = 16, objective: str = "causal-lm"
) -> list[float]:
    """A score of every layer, larger is more important.

    `input-modification`: minus the cosine between all of a row's stream before and after the layer, averaged over rows.
    `token-modification`: the same a token (block influence minus 1).
    `z-score`: minus the share of a matrix's weights more than one standard deviation above its mean, averaged over the layer's
    matrices; `absolute-z-score`: beyond one on either side. Neither looks at data.
    `angular-distance`: see `layerwise.analyze.similarity`. `taylor`: sum over the layer of |weight x gradient|; `gradient-norm`: of its
    gradient. Both of the loss on the samples.

    Sources: Dumitru et al. 2024, "Layer-Wise Quantization" (arXiv 2406.17415); Men et al. 2024, "ShortGPT" (arXiv 2403.03853); Gromov et
    al. 2024 (arXiv 2403.17887); Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8.
    """
    if by in ("z-score", "absolute-z-score"):
        return [-outliers(layer, absolute=by.startswith("absolute")) for layer in model.stack.layers]
    if by in ("input-modification", "token-modification"):
        return modification(model, data, whole=by.startswith("input"), samples=samples, split=split, batch=batch)
    if by == "angular-distance":
        return block_distances(distances(model, data, split=split, samples=samples, batch=batch), 1)
    if by in ("taylor", "gradient-norm"):
        return gradient_scores(model, data, taylor=by == "taylor", samples=samples, split=split, batch=batch, objective=objective)
    raise BadInput(f"layers are scored by {', '.join(get_args(Score))}; got '{by}'")


def layer_importance(
    model: Model, data: Any, *, samples: int = 64, split: str = "train", batch: int = 16, objective: str = "causal-lm"
) -> Findings:
    """Every score of every layer, in one table; larger is more important.

    Metrics: `first_last_top`, of the scores by which the first or the last layer is the most important, the share.
    """
    names = get_args(Score)
    columns = [layer_scores(model, data, by, samples=samples, split=split, batch=batch, objective=objective) for by in names]
    rows: list[list[Cell]] = [[i, *(column[i] for column in columns)] for i in range(model.stack.depth)]
    ends = [max(range(len(c)), key=c.__getitem__) in (0, len(c) - 1) for c in columns if c]
    table = Table("Importance of layers (larger is more important)", ["layer", *names], rows)
    return Findings({"first_last_top": sum(ends) / max(len(ends), 1)}, [table])


def cosine(a: Float[Tensor, "rows n"], b: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
    """Cosine of the angle, in float64; 0 where a vector is zero."""
    a, b = a.double(), b.double()
    return (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-300)


def modification(model: Model, data: Any, *, whole: bool, samples: int, split: str, batch: int) -> list[float]:
    """Minus the cosine between the stream that enters and that leaves each layer, of whole rows or of tokens."""
    total = torch.zeros(model.stack.depth, dtype=torch.float64)
    seen = 0
    with inference(model):
        for rows in batches(split_of(data, split), batch, -(-samples // batch), model.device):
            stream = record(model, rows, hidden="all", inputs=[0]).stream()
            seen += len(stream[0])
            for i, (before, after) in enumerate(zip(stream, stream[1:], strict=False)):
                each = cosine(before.flatten(1), after.flatten(1)) if whole else cosine(before, after).flatten(1).mean(dim=1)
                total[i] -= each.sum().cpu()
    return (total / max(seen, 1)).tolist()


@torch.no_grad()
def outliers(layer: nn.Module, *, absolute: bool = False) -> float:
    """Share of weights more than one standard deviation above their matrix's mean (`absolute`: away from it), averaged over matrices."""
    shares = [unusual(m.materialize(), absolute=absolute) for m in layer.modules() if isinstance(m, Linear)]
    return sum(shares) / max(len(shares), 1)


def unusual(weight: Float[Tensor, ...], *, absolute: bool = False) -> float:
    """Share of numbers more than one standard deviation above the mean; 0 for equal numbers."""
    w = weight.double()
    away = w - w.mean()
    spread = away.square().mean().sqrt()
    if spread <= 1e-12 * w.abs().max():
        return 0.0
    return ((away.abs() if absolute else away) > spread).double().mean().item()


def gradient_scores(model: Model, data: Any, *, taylor: bool, samples: int, split: str, batch: int, objective: str) -> list[float]:
    """Of every layer, |weight x gradient| summed, or the norm of the gradient, of the mean loss over batches."""
    loss_of = lookup(OBJECTIVES, objective, "objective")(data).to(model.device)
    generator = torch.Generator(device=model.device).manual_seed(0)
    depths, depth = depth_of(model), model.stack.depth
    inside = {n: p for n, p in model.named_parameters() if 0 <= depths[n] < depth and p.requires_grad}
    sums = {n: torch.zeros_like(p) for n, p in inside.items()}
    training, seen = model.training, 0
    model.eval()
    for rows in batches(split_of(data, split), batch, -(-samples // batch), model.device):
        loss = loss_of(model, rows, generator).mean
        for (n, _), gradient in zip(inside.items(), torch.autograd.grad(loss, list(inside.values()), allow_unused=True), strict=True):
            if gradient is not None:
                sums[n] += gradient
        seen += 1
    model.train(training)
    measure: Callable[[str], float] = (
        (lambda n: (inside[n].detach() * sums[n] / seen).abs().sum().item())
        if taylor
        else (lambda n: (sums[n] / seen).square().sum().item())
    )
    found = [sum(measure(n) for n in inside if depths[n] == i) for i in range(depth)]
    return found if taylor else [f**0.5 for f in found]
