"""Taking whole layers out."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, Literal, get_args

from layerwise.analyze.scores import Score, layer_order
from layerwise.analyze.similarity import best_block, distances
from layerwise.errors import BadInput
from layerwise.evaluate.language import language_modeling
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.stack.surgery import keep

Rule = Literal["angular", "deepest", "random", "shallowest", "best", "even", "scattered", Score]


def choose_block(
    model: Model,
    data: Any,
    *,
    count: int,
    rule: Rule = "angular",
    samples: int = 256,
    split: str = "train",
    seed: int | None = None,
) -> list[int]:
    """The `count` layers that a rule would drop: a block of neighbours or, by a score, the least important ones wherever they stand.

    Args:
        rule: `angular`: the stream turns least over it; `deepest`: the highest layers except the last, which is never
            dropped; `random`: a block drawn with `seed`; `shallowest`: from layer 1 on; `best`: the block without which
            the loss on `split` is lowest, found by trying all. Not of neighbours: `even`, spread evenly between the first and the last;
            `scattered`, any of those between, drawn with `seed`; any score of `layerwise.analyze.scores`: those with the lowest.
        samples: rows that `angular`, `best` and scores look at.

    Sources: Gromov et al. 2024, section 3.2 and the simpler strategy of section 4.4 (arXiv 2403.17887); Men et al. 2024, "ShortGPT"
    (arXiv 2403.03853), whose block influence is `token-modification`;
    Liu et al. 2024, "Accelerating Inference in Large Language Models with a Unified Layer Skipping Strategy" (arXiv 2404.06954; `even`).
    """
    preview_drop(model.spec, count=count, rule=rule)
    depth = model.stack.depth
    if not count:
        return []
    if rule in get_args(Score):
        return sorted(layer_order(model, data, rule, reverse=True, samples=samples, split=split)[:count])  # type: ignore[arg-type]
    if rule == "even":
        return [round((k + 1) * (depth - 1) / (count + 1)) for k in range(count)]
    if rule == "scattered":
        return sorted(random.Random(seed or 0).sample(range(1, depth - 1), count))
    starts = range(depth - count + 1)
    if rule == "angular":
        first = best_block(distances(model, data, split=split, samples=samples), count)
    elif rule == "deepest":
        first = depth - 1 - count
    elif rule == "shallowest":
        first = min(1, depth - count)
    elif rule == "random":
        first = random.Random(seed or 0).choice(starts)
    else:
        limit = -(-samples // 16)

        def loss(start: int) -> float:
            path = [i for i in range(depth) if not start <= i < start + count]
            return language_modeling(model, data, split=split, batches_at_most=limit, path=path).metrics["val_loss"]

        first = min(starts, key=loss)
    return list(range(first, first + count))


def drop_layers(
    model: Model,
    data: Any = None,
    *,
    count: int | None = None,
    layers: Sequence[int] | None = None,
    rule: Rule = "angular",
    samples: int = 256,
    split: str = "train",
    seed: int | None = None,
) -> Model:
    """The model without some layers: those named in `layers`, or the `count` that `choose_block` finds.

    The kept layers are shared with the given model, unchanged; caches and positions count anew by themselves.

    Raises:
        BadInput: neither or both of count and layers, or a layer that is not there.
    """
    preview_drop(model.spec, count=count, layers=layers, rule=rule)
    if layers is not None:
        gone = set(layers)
    else:
        assert count is not None
        gone = set(choose_block(model, data, count=count, rule=rule, samples=samples, split=split, seed=seed))
    return model.with_stack(keep(model.stack, [i for i in range(model.stack.depth) if i not in gone]))


def preview_drop(
    spec: ModelSpec, *, count: int | None = None, layers: Sequence[int] | None = None, rule: Rule = "angular", **_: Any
) -> ModelSpec:
    """What `drop_layers` makes of a model's description (when a rule chooses: one of the right depth)."""
    depth = spec.stack.depth
    if (count is None) == (layers is None):
        raise BadInput("drop-layers needs either count or layers")
    if layers is not None:
        bad = [i for i in layers if not 0 <= i < depth]
        if bad:
            raise BadInput(f"cannot drop layer {bad[0]}: the stack has layers 0 to {depth - 1}")
    elif not 0 <= (count or 0) <= depth:
        raise BadInput(f"cannot drop {count} layers of a stack of {depth}")
    elif rule in ("even", "scattered") and count and count > depth - 2:
        raise BadInput(f"rule {rule} keeps the first and the last layer, so it can drop at most {max(depth - 2, 0)} of {depth} layers")
    elif rule == "deepest" and count == depth:
        raise BadInput(f"the deepest-first rule keeps the last layer, so it can drop at most {depth - 1} of {depth} layers")
    gone = set(layers if layers is not None else range(depth - (count or 0), depth))
    kept: list[Any] = [layer for i, layer in enumerate(spec.stack.layers) if i not in gone]
    return dataclasses.replace(spec, stack=spec.stack.with_layers(kept))
