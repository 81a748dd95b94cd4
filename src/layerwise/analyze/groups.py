"""How much each head group, inner channel and channel of the stream matters: what pruners of width read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from layerwise.analyze.findings import Cell, Findings, Matrix, Table
from layerwise.analyze.gradients import mean_gradients
from layerwise.analyze.importance import Importance, neuron_importance
from layerwise.edit.prune.width import LAYER, OUTSIDE, Axis
from layerwise.errors import BadInput
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.nn.integers import check_width, find_grid
from layerwise.stack.spec import StackSpec

GroupScore = Literal["magnitude", "taylor", "gradient-norm", "quantization-error", "activation", "random"]


def group_scores(
    model: Model,
    data: Any,
    by: str,
    *,
    samples: int = 64,
    split: str = "train",
    batch: int = 16,
    objective: str = "causal-lm",
    bits: int = 4,
    seed: int = 0,
) -> Importance:
    """A score of every group of coupled weights, larger is more important: what goes together when width is cut.

    A group is a key/value head with the query heads that share it (rows of q, k and v, columns of o), an inner channel of the feed-forward
    (rows of gate and up, column of down), or a channel of the stream (everywhere). Biases and gains along an axis belong to it.

    `magnitude`: norm of its weights; `taylor`: sum of |weight x gradient|, with the gradient of the loss averaged over batches before its
    absolute value is taken; `gradient-norm`: norm of that gradient; `quantization-error`: norm of what rounding the matrices to `bits`,
    one range a row, changes in it; `activation`: mean absolute activation (`neuron_importance`); `random`: drawn with `seed`.

    Sources: Ma et al. 2023, "LLM-Pruner" (arXiv 2305.11627), section 3.2; Molchanov et al. 2019, equation 8.

    Raises:
        BadInput: an unknown score, or no layer with heads or a feed-forward.
    """
    check_groups(model.spec, by=by, bits=bits)
    if by == "activation":
        return neuron_importance(model, data, samples=samples, split=split, batch=batch)
    if by == "random":
        return _drawn(model, seed)
    known = {name: parameter.detach() for name, parameter in model.named_parameters() if _axes(name)}
    squared = by != "taylor"
    values: Iterator[tuple[str, Tensor]]
    if by in ("taylor", "gradient-norm"):
        trained = {name for name, parameter in model.named_parameters() if name in known and parameter.requires_grad}
        gradients = mean_gradients(model, data, trained, samples=samples, split=split, batch=batch, objective=objective)
        values = ((n, g.square() if squared else (known[n] * g).abs()) for n, g in gradients.items())
    elif by == "magnitude":
        values = ((n, w.square()) for n, w in known.items())
    else:
        values = ((n, rounding_error(w, bits).square()) for n, w in known.items() if w.dim() == 2 and n.startswith("stack."))
    found = summed(model, values)
    return Importance(found.stream.sqrt(), [g.sqrt() for g in found.groups], [f.sqrt() for f in found.ffn]) if squared else found


def check_groups(spec: ModelSpec, *, by: str, bits: int, **_: Any) -> None:
    """Raises BadInput: an unknown score, bits that there are not, or layers without heads and a feed-forward."""
    if by not in get_args(GroupScore):
        raise BadInput(f"groups are scored by {', '.join(get_args(GroupScore))}; got '{by}'")
    if by == "quantization-error":
        check_width(bits)
    if not isinstance(spec.stack, StackSpec):
        raise BadInput("head groups and inner channels are those of transformer layers; this stack has others")


def summed(model: Model, values: Iterator[tuple[str, Tensor]]) -> Importance:
    """Numbers, one for each weight, added up over the groups that the weight belongs to.

    Args:
        values: name of a parameter and a tensor of its shape.
    """
    layers: list[Any] = [layer.spec for layer in model.stack.layers]
    kind: dict[str, Any] = {"dtype": torch.float64, "device": model.device}
    stream = torch.zeros(model.stack.spec.width, **kind)
    groups, ffn = [torch.zeros(s.kv_heads, **kind) for s in layers], [torch.zeros(s.ffn_width, **kind) for s in layers]
    for name, value in values:
        for dim, axis in enumerate(_axes(name)):
            if axis is None:
                continue
            along = value.double().movedim(dim, 0).flatten(1).sum(dim=1) if value.dim() > 1 else value.double()
            if axis == "stream":
                stream += along
            elif axis == "ffn":
                ffn[int(name.split(".")[2])] += along
            else:  # query head h reads key/value head h // (heads / kv_heads), so a group's heads are neighbours
                i = int(name.split(".")[2])
                groups[i] += along.reshape(len(groups[i]), -1).sum(dim=1)
    return Importance(stream, groups, ffn)


def rounding_error(weight: Tensor, bits: int) -> Tensor:
    """What rounding to nearest, one range a row, changes in a matrix."""
    grid = find_grid(weight, bits)
    return grid.values(grid.nearest(weight.float())) - weight


def group_importance(
    model: Model,
    data: Any,
    *,
    by: GroupScore = "taylor",
    samples: int = 64,
    split: str = "train",
    batch: int = 16,
    objective: str = "causal-lm",
    bits: int = 4,
    seed: int | None = None,
) -> Findings:
    """A score of every key/value head and, layer by layer, how the scores of the feed-forward's channels are spread.

    Metrics: `upper_half_share`, of the channels' total score what the better half of a layer's channels holds, averaged over layers
    (0.5: all alike, so that it does not matter which go).
    """
    found = group_scores(model, data, by, samples=samples, split=split, batch=batch, objective=objective, bits=bits, seed=seed or 0)
    rows: list[list[Cell]] = []
    shares = []
    for i, (heads, channels) in enumerate(zip(found.groups, found.ffn, strict=True)):
        best = channels.sort(descending=True).values
        shares.append((best[: -(-len(best) // 2)].sum() / best.sum().clamp(min=1e-300)).item())
        rows.append(
            [i, len(heads), heads.min().item(), heads.max().item(), len(channels), *best[[-1, len(best) // 2, 0]].tolist(), shares[-1]]
        )
    columns = ["layer", "kv heads", "least head", "best head", "channels", "least channel", "median channel", "best channel", "upper half"]
    widest = max((len(g) for g in found.groups), default=0)
    grid: list[list[float | None]] = [[*g.tolist(), *[None] * (widest - len(g))] for g in found.groups]
    matrix = Matrix(f"Key/value heads by {by}", "head", "layer", list(range(widest)), list(range(len(grid))), grid)
    metrics = {"upper_half_share": sum(shares) / max(len(shares), 1)}
    return Findings(metrics, [Table(f"Groups of weights by {by} (larger is more important)", columns, rows)], [matrix])


def _axes(name: str) -> tuple[Axis, ...]:
    """What the axes of a parameter run along; empty for one that belongs to no group."""
    if name.startswith("stack.layers."):
        return LAYER.get(name.split(".", 3)[3], ())
    return OUTSIDE.get(name, ())


def _drawn(model: Model, seed: int) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    layers: list[Any] = [layer.spec for layer in model.stack.layers]
    counts = [model.stack.spec.width, *(s.kv_heads for s in layers), *(s.ffn_width for s in layers)]
    stream, *rest = [torch.rand(n, generator=generator, dtype=torch.float64) for n in counts]
    return Importance(stream, rest[: len(layers)], rest[len(layers) :])
