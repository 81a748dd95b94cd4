"""How much each layer matters, by many scores beside one another: one table that pruners and allocators of bits read."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.analyze.gradients import mean_gradients
from layerwise.analyze.similarity import block_distances, distances
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.nn.integers import check_width, find_grid
from layerwise.nn.linear import Linear
from layerwise.objectives import OBJECTIVES
from layerwise.stack.context import Call, Context
from layerwise.stack.depth import depth_of
from layerwise.stack.record import record
from layerwise.table import lookup

Score = Literal[
    "input-modification",
    "token-modification",
    "euclidean-change",
    "manhattan-change",
    "z-score",
    "absolute-z-score",
    "angular-distance",
    "taylor",
    "gradient-norm",
    "quantization-error",
    "layer-drop",
]
By = Literal[Score, "random"]
"""What layers can be put in order by."""


def layer_scores(
    model: Model,
    data: Any,
    by: str,
    *,
    samples: int = 64,
    split: str = "train",
    batch: int = 16,
    objective: str = "causal-lm",
    bits: int = 4,
) -> list[float]:
    """A score of every layer, larger is more important.

    `input-modification`: minus the cosine between all of a row's stream before and after the layer, averaged over rows.
    `token-modification`: the same a token (block influence minus 1); `euclidean-change`, `manhattan-change`: mean distance between the
    stream before and after, a token.
    `z-score`: minus the share of a matrix's weights more than one standard deviation above its mean, averaged over the layer's
    matrices; `absolute-z-score`: beyond one on either side. Neither looks at data.
    `angular-distance`: see `layerwise.analyze.similarity`. `taylor`: sum over the layer of |weight x gradient|; `gradient-norm`: of its
    gradient. Both of the loss on the samples.
    `quantization-error`: squared error of what the layer gives, over its squared norm, when this layer alone is rounded to `bits`, one
    range a row. `layer-drop`: what skipping the layer adds to the loss (in nats; the perplexity is multiplied by its exponential).

    Sources: Dumitru et al. 2024, "Layer-Wise Quantization" (arXiv 2406.17415); Men et al. 2024, "ShortGPT" (arXiv 2403.03853); Gromov et
    al. 2024 (arXiv 2403.17887); Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8; Pan et al. 2025,
    "Adapt-Pruner" (arXiv 2502.03460) for the distances.
    """
    some: dict[str, Any] = {"samples": samples, "split": split, "batch": batch}
    if by in ("z-score", "absolute-z-score"):
        return [-outliers(layer, absolute=by.startswith("absolute")) for layer in model.stack.layers]
    if by in CHANGES:
        return stream_changes(model, data, CHANGES[by], **some)
    if by == "angular-distance":
        return block_distances(distances(model, data, **some), 1)
    if by in ("taylor", "gradient-norm"):
        return gradient_scores(model, data, taylor=by == "taylor", objective=objective, **some)
    if by == "quantization-error":
        return rounding_errors(model, data, bits=bits, **some)
    if by == "layer-drop":
        return losses_without(model, data, objective=objective, **some)[1]
    raise BadInput(f"layers are scored by {', '.join(get_args(Score))}; got '{by}'")


def layer_order(
    model: Model,
    data: Any,
    by: By,
    *,
    reverse: bool = False,
    samples: int = 64,
    split: str = "train",
    objective: str = "causal-lm",
    seed: int = 0,
) -> list[int]:
    """The layers, the most important first (`reverse`: the least), by a score of the model as it is."""
    depth = model.stack.depth
    if by == "random":
        order = random.Random(seed).sample(range(depth), depth)
    else:
        score = layer_scores(model, data, by, samples=samples, split=split, objective=objective)
        order = sorted(range(depth), key=lambda i: (-score[i], i))
    return order[::-1] if reverse else order


def layer_importance(
    model: Model,
    data: Any,
    *,
    samples: int = 64,
    split: str = "train",
    batch: int = 16,
    objective: str = "causal-lm",
    bits: int = 4,
) -> Findings:
    """Every score of every layer, in one table; larger is more important.

    Metrics: `first_last_top`, of the scores by which the first or the last layer is the most important, the share.
    """
    check_importance(model.spec, bits=bits)
    names = get_args(Score)
    columns = [layer_scores(model, data, by, samples=samples, split=split, batch=batch, objective=objective, bits=bits) for by in names]
    rows: list[list[Cell]] = [[i, *(column[i] for column in columns)] for i in range(model.stack.depth)]
    ends = [max(range(len(c)), key=c.__getitem__) in (0, len(c) - 1) for c in columns if c]
    table = Table("Importance of layers (larger is more important)", ["layer", *names], rows)
    return Findings({"first_last_top": sum(ends) / max(len(ends), 1)}, [table])


def check_importance(spec: ModelSpec, *, bits: int, **_: Any) -> None:
    """Raises BadInput: matrices cannot be rounded to so many bits."""
    check_width(bits)


def cosine(a: Float[Tensor, "rows n"], b: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
    """Cosine of the angle, in float64; 0 where a vector is zero."""
    a, b = a.double(), b.double()
    return (a * b).sum(dim=-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-300)


def _distance(a: Tensor, b: Tensor, order: int) -> Tensor:
    return torch.linalg.vector_norm(b.double() - a.double(), order, dim=-1).flatten(1).mean(dim=1)


Change = Callable[[Tensor, Tensor], Float[Tensor, " rows"]]
CHANGES: dict[str, Change] = {
    "input-modification": lambda a, b: -cosine(a.flatten(1), b.flatten(1)),
    "token-modification": lambda a, b: -cosine(a, b).flatten(1).mean(dim=1),
    "euclidean-change": lambda a, b: _distance(a, b, 2),
    "manhattan-change": lambda a, b: _distance(a, b, 1),
}
"""How much a layer changes each row's stream, from what enters and what leaves; larger is more."""


def stream_changes(model: Model, data: Any, change: Change, *, samples: int, split: str, batch: int) -> list[float]:
    """A measure of change between the stream that enters and that leaves each layer, averaged over rows."""
    total = torch.zeros(model.stack.depth, dtype=torch.float64)
    seen = 0
    with inference(model):
        for rows in batches(split_of(data, split), batch, -(-samples // batch), model.device):
            stream = record(model, rows, hidden="all", inputs=[0]).stream()
            seen += len(stream[0])
            for i, (before, after) in enumerate(zip(stream, stream[1:], strict=False)):
                total[i] += change(before, after).sum().cpu()
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
    depths, depth = depth_of(model), model.stack.depth
    inside = {n: p.detach() for n, p in model.named_parameters() if 0 <= depths[n] < depth and p.requires_grad}
    gradients = mean_gradients(model, data, inside, samples=samples, split=split, batch=batch, objective=objective)
    sizes = {n: ((inside[n] * g).abs() if taylor else g.square()).sum().item() for n, g in gradients.items()}
    found = [sum(size for n, size in sizes.items() if depths[n] == i) for i in range(depth)]
    return found if taylor else [f**0.5 for f in found]


def rounding_errors(model: Model, data: Any, *, bits: int, samples: int, split: str, batch: int) -> list[float]:
    """||f(x) - f_q(x)||^2 / ||f(x)||^2 of every layer f on the inputs it has in the full-precision model; f_q has rounded matrices."""
    errors, norms = (torch.zeros(model.stack.depth, dtype=torch.float64) for _ in range(2))

    def compare(i: int, layer: nn.Module, x: Tensor, ctx: Context, call: Call) -> Tensor:
        y = call(x, ctx)
        errors[i] += (rounded(layer, bits)(x, ctx, (i, 0)) - y).double().square().sum().cpu()
        norms[i] += y.double().square().sum().cpu()
        return y

    with inference(model):
        for rows in batches(split_of(data, split), batch, -(-samples // batch), model.device):
            model(rows, around=(compare,))
    return (errors / norms.clamp(min=1e-300)).tolist()


@torch.no_grad()
def rounded(layer: nn.Module, bits: int) -> nn.Module:
    """A copy of a layer with every matrix rounded to nearest, one range a row."""
    made = copy.deepcopy(layer)
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                dense = child.merge()
                grid = find_grid(dense.weight, bits)
                dense.weight.copy_(grid.values(grid.nearest(dense.weight)))
                setattr(parent, name, dense)
    return made


def losses_without(model: Model, data: Any, *, objective: str, samples: int, split: str, batch: int) -> tuple[float, list[float]]:
    """Mean loss with all layers, and what skipping each of them adds to it."""
    loss_of = lookup(OBJECTIVES, objective, "objective")(data).to(model.device)
    depth = model.stack.depth
    paths = [list(range(depth)), *([j for j in range(depth) if j != i] for i in range(depth))]
    totals, counts = [0.0] * len(paths), [0.0] * len(paths)
    with inference(model):
        for b, rows in enumerate(batches(split_of(data, split), batch, -(-samples // batch), model.device)):
            for i, path in enumerate(paths):
                # Objectives that draw at random draw the same for every path.
                loss = loss_of(model, rows, torch.Generator(device=model.device).manual_seed(b), path=path)
                totals[i] += float(loss.total)
                counts[i] += float(loss.count)
    whole, *without = [total / max(count, 1) for total, count in zip(totals, counts, strict=True)]
    return whole, [loss - whole for loss in without]
