"""Pruning width: heads, inner channels and the residual stream, by the scores of their weights and the importance of their layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.analyze.groups import GroupScore, group_scores
from layerwise.analyze.importance import Importance
from layerwise.analyze.scores import Score, layer_scores
from layerwise.edit.prune.sparsity import LARGEST, Widths, advance, centred, widths_of
from layerwise.edit.prune.width import cut_spec, cut_width
from layerwise.errors import BadInput
from layerwise.models.load import described
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec

Parts = Literal["all", "heads", "ffn"]


def prune_width(
    model: Model,
    data: Any = None,
    *,
    keep: float | Sequence[float],
    of: str | None = None,
    by: GroupScore = "taylor",
    adapt: Score | None = None,
    amplitude: float = 0.02,
    steps: int = 50,
    parts: Parts = "all",
    width: int | None = None,
    samples: int = 64,
    batch: int = 16,
    split: str = "train",
    objective: str = "causal-lm",
    seed: int | None = None,
) -> Model:
    """The model with the more important key/value heads (each with its query heads) and inner channels, in really smaller tensors.

    Sparsities of the layers rise by 1/steps a step until few enough weights are left, and the last step is shortened so that hardly
    fewer are. Scores are measured anew in every step. With `adapt`, sparsities rise by 1/steps - amplitude I_i, where I_i is the layer's
    importance with mean 0 and largest value 1: layers that change the stream little lose more. What is kept is neither rescaled nor merged.

    Args:
        keep: share of the prunable weights that are left (those of `parts`; embeddings, norms and head are none), or for each layer the
            share of its heads and channels.
        of: keep is a share of this model's, a checkpoint's folder (in a job also `stage:NAME`), and sparsities go on from what the given
            model has lost since: pruning in stages with training between them. None: of the given one's, from sparsity 0 (which is how
            the published code begins every stage; heads then go only in a stage that takes a whole one).
        by: score of heads and channels, see `layerwise.analyze.groups`.
        adapt: score of layers that their sparsities follow, see `layerwise.analyze.scores`; None prunes all layers alike. The paper's are
            `token-modification` (cosine), `euclidean-change` and `manhattan-change`.
        amplitude: how strongly they follow it. steps: to remove everything; 1 prunes in one step.
        parts: what is pruned: heads and the feed-forward (`all`), or one of them.
        width: first cut the residual stream to so many channels, by the same score.
        samples, batch, split, objective: what scores are measured on.

    Raises:
        BadInput: nothing that small is left with one head and one channel a layer, or the model has parts that cannot be cut.

    Sources: Pan et al. 2025, "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model Training" (arXiv 2502.03460),
    section 3; Ma et al. 2023, "LLM-Pruner" (arXiv 2305.11627), which is `adapt: null, steps: 1`.
    """
    some: dict[str, Any] = {"samples": samples, "batch": batch, "split": split}
    preview_width(model.spec, keep=keep, of=of, by=by, adapt=adapt, amplitude=amplitude, steps=steps, parts=parts, width=width)

    def scored(now: Model) -> Importance:
        return group_scores(now, data, by, objective=objective, seed=seed or 0, **some)

    goal, widths = _aim(model.spec, keep, of, parts)
    if width is not None:
        model = cut_width(model, stream=best(scored(model).stream, width))
        _, widths = _aim(model.spec, keep, of, parts)
    groups, channels = _counts(model.spec)
    if isinstance(keep, Sequence):
        return _cut(model, scored(model), *widths.kept([1 - k for k in keep], groups, channels), parts)
    sparsity, importance, now = widths.lost(groups, channels, heads=parts == "heads"), [0.0] * len(groups), model
    measured: Model | None = None
    while widths.weights(groups, channels) > goal:
        if adapt is not None and amplitude and measured is not now:
            importance, measured = centred(layer_scores(now, data, adapt, objective=objective, **some)), now
        before = (groups, channels)
        sparsity, groups, channels = advance(widths, groups, channels, sparsity, importance, 1 / steps, amplitude, goal)
        if (groups, channels) != before:
            now = _cut(now, scored(now), groups, channels, parts)
    return now


def preview_width(
    spec: ModelSpec,
    *,
    keep: float | Sequence[float],
    of: Any = None,
    adapt: str | None = None,
    amplitude: float = 0.02,
    steps: int = 50,
    parts: Parts = "all",
    width: int | None = None,
    **_: Any,
) -> ModelSpec:
    """What `prune_width` makes of a model's description; with `adapt`, as if higher layers were less important.

    Where `of` names a model that is not there yet, the description stays: the result is no larger.
    """
    if amplitude < 0 or steps < 1:
        raise BadInput(f"amplitude is >= 0 and steps at least 1; got {amplitude} and {steps}")
    shares = list(keep) if isinstance(keep, Sequence) else [keep]
    if not all(0 < k <= 1 for k in shares):
        raise BadInput(f"keep is a share in (0, 1], or one for each layer; got {keep}")
    if isinstance(keep, Sequence) and (adapt is not None or of is not None):
        raise BadInput("adapt finds each layer's share itself, and of is a model to keep one share of: give keep as one number")
    if isinstance(keep, Sequence) and len(shares) != spec.stack.depth:
        raise BadInput(f"keep is one share, or one for each of {spec.stack.depth} layers; got {len(shares)}")
    heads, ffn = parts != "ffn", parts != "heads"
    everything = [1] * spec.stack.depth
    cut_spec(spec, width, everything if heads else None, everything if ffn else None)
    if getattr(spec.stack, "shared", ()):
        raise BadInput("layers that share their weights have one width: prune-width needs layers of their own")
    narrow = spec if width is None else cut_spec(spec, width, None, None)
    groups, channels = _counts(narrow)
    if isinstance(keep, Sequence):
        return _spec(narrow, *_aim(narrow, keep, None, parts)[1].kept([1 - k for k in keep], groups, channels), parts)
    if of is not None and not Path(of).is_dir():
        return narrow
    goal, widths = _aim(spec, keep, of, parts)[0], _aim(narrow, keep, of, parts)[1]
    least = widths.weights(*widths.kept([LARGEST] * len(groups), groups, channels))
    if least > goal:
        raise BadInput(f"keep {keep} means at most {goal:,} weights, but pruning ends at {least:,} (a head and a channel in every layer)")
    sparsity = widths.lost(groups, channels, heads=parts == "heads")
    ramp = centred([-float(i) for i in range(len(groups))]) if adapt is not None else [0.0] * len(groups)
    while widths.weights(groups, channels) > goal:
        sparsity, groups, channels = advance(widths, groups, channels, sparsity, ramp, 1 / steps, amplitude, goal)
    return _spec(narrow, groups, channels, parts)


def best(scores: Tensor, count: int) -> list[int]:
    """The `count` largest, in their old order; of equals the first ones."""
    return sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist())


def _aim(spec: Any, keep: float | Sequence[float], of: str | None, parts: Parts) -> tuple[int, Widths]:
    """How many weights are to be left, and the widths that shares are taken of: those of `of`, with the weights of this model's channels.

    Raises:
        BadInput: `of` is not what this model could have been cut from.
    """
    here = widths_of(spec.stack, heads=parts != "ffn", ffn=parts != "heads")
    if of is None or isinstance(keep, Sequence):
        return (0 if isinstance(keep, Sequence) else math.floor(keep * here.weights() + 1e-6)), here
    whole: Any = described(Path(of))
    first = widths_of(whole.stack, heads=parts != "ffn", ffn=parts != "heads")
    if len(first.groups) != len(here.groups) or any(
        a > b for a, b in zip((*here.groups, *here.channels), (*first.groups, *first.channels), strict=True)
    ):
        raise BadInput(f"of: the model in {of} has other layers, or narrower ones, so this model cannot have been cut from it")
    return math.floor(keep * first.weights() + 1e-6), dataclasses.replace(here, groups=first.groups, channels=first.channels)


def _counts(spec: Any) -> tuple[list[int], list[int]]:
    """Key/value heads and inner channels of each layer."""
    return [s.kv_heads or s.heads for s in spec.stack.layers], [s.ffn_width or 1 for s in spec.stack.layers]


def _cut(model: Model, scores: Importance, groups: Sequence[int], channels: Sequence[int], parts: Parts) -> Model:
    heads = [best(s, n) for s, n in zip(scores.groups, groups, strict=True)]
    inner = [best(s, n) for s, n in zip(scores.ffn, channels, strict=True)]
    return cut_width(model, groups=heads if parts != "ffn" else None, ffn=inner if parts != "heads" else None)


def _spec(spec: ModelSpec, groups: Sequence[int], channels: Sequence[int], parts: Parts) -> ModelSpec:
    return cut_spec(spec, None, groups if parts != "ffn" else None, channels if parts != "heads" else None)
