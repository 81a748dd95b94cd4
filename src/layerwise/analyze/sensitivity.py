"""What a model loses without each of its layers, and without each block of them."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any

from layerwise.analyze.findings import Cell, Findings, Matrix, Table
from layerwise.analyze.scores import losses_without
from layerwise.analyze.similarity import best_block, distances
from layerwise.edit.drop import Rule, choose_block, preview_drop
from layerwise.errors import BadInput
from layerwise.evaluate.language import language_modeling
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec


def layer_drop(model: Model, data: Any, *, split: str = "validation", batch: int = 16, batches_at_most: int = 8) -> Findings:
    """Validation loss with each layer skipped in turn, minus the loss with all of them.

    Metrics: `whole_loss` of the whole model, `layer_drop_mean`.
    """
    whole, drops = losses_without(model, data, objective="causal-lm", samples=batch * batches_at_most, split=split, batch=batch)
    table = Table("Loss added by skipping a layer", ["layer", "added loss"], [[i, d] for i, d in enumerate(drops)])
    return Findings({"whole_loss": whole, "layer_drop_mean": sum(drops) / max(len(drops), 1)}, [table])


def block_drop(
    model: Model,
    data: Any,
    *,
    count: int,
    rule: Rule = "angular",
    samples: int = 256,
    split: str = "validation",
    batch: int = 16,
    batches_at_most: int = 8,
) -> Findings:
    """Loss on a split without the `count` layers that a rule would drop (chosen on training rows).

    For `random` it is the exact expectation, the mean over all blocks of that length: one draw says little, as a block with
    the first layer in it costs many times more than others.

    Metrics: `block_loss`, and `block_loss_added` to the whole model's.
    """
    preview_drop(model.spec, count=count, rule=rule)
    losses = _Losses(model, data, split=split, batch=batch, batches_at_most=batches_at_most)
    whole = losses([])
    if rule == "random":
        blocks = [range(i, i + count) for i in range(model.stack.depth - count + 1)] if count else [range(0)]
        loss = sum(losses(block) for block in blocks) / len(blocks)
    else:
        loss = losses(choose_block(model, data, count=count, rule=rule, samples=samples))
    return Findings({"block_loss": loss, "block_loss_added": loss - whole})


def block_sweep(
    model: Model,
    data: Any,
    *,
    lengths: Sequence[int] = (1, 2, 3, 4),
    samples: int = 256,
    draws: int = 5,
    batch: int = 16,
    batches_at_most: int = 8,
    seed: int | None = None,
) -> Findings:
    """Loss without a block of neighbouring layers, for every block of the given lengths, and what each rule would have lost.

    The angular distances come from training rows, the losses from validation rows. `regret` is the loss after the rule's
    choice minus the loss after the best choice; `random` is the mean over `draws` blocks.

    Metrics: `angular_regret_mean` over the lengths, `whole_loss` of the whole model.
    Source of the protocol: Gromov et al. 2024, section 4 (arXiv 2403.17887).
    """
    check_sweep(model.spec, lengths=lengths)
    depth = model.stack.depth
    matrix = distances(model, data, samples=samples, batch=batch)
    losses = _Losses(model, data, split="validation", batch=batch, batches_at_most=batches_at_most)
    generator = random.Random(seed or 0)
    rows: list[list[Cell]] = []
    grid: list[list[float | None]] = []
    for n in lengths:
        starts = range(depth - n + 1)
        each = [losses(range(first, first + n)) for first in starts]
        angular, best = best_block(matrix, n), min(starts, key=each.__getitem__)
        chance = sum(each[generator.choice(starts)] for _ in range(draws)) / draws
        rows.append(
            [n, angular, each[angular], each[depth - 1 - n], each[min(1, depth - n)], chance, best, each[best], each[angular] - each[best]]
        )
        grid.append([*each, *[None] * (n - 1)])
    columns = ["layers dropped", "angular: first", "angular", "deepest", "shallowest", "random", "best: first", "best", "regret of angular"]
    regret = [float(row[-1] or 0) for row in rows]
    return Findings(
        {"whole_loss": losses([]), "angular_regret_mean": sum(regret) / len(regret)},
        [Table("Validation loss without a block", columns, rows)],
        [Matrix("Validation loss without a block", "first layer", "layers dropped", list(range(depth)), list(lengths), grid)],
    )


def check_sweep(spec: ModelSpec, *, lengths: Sequence[int], **_: Any) -> None:
    """Raises BadInput: no lengths, or one that the stack has not."""
    depth = spec.stack.depth
    if not lengths:
        raise BadInput("block-sweep: lengths names no block; give some numbers of layers")
    bad = [n for n in lengths if not 1 <= n < depth]
    if bad:
        raise BadInput(f"block-sweep: a block of {bad[0]} layers cannot be taken from a stack of {depth}; lengths are 1 to {depth - 1}")


class _Losses:
    """Loss on a split without some layers, by running the path around them."""

    def __init__(self, model: Model, data: Any, **options: Any) -> None:
        self.model, self.data, self.options = model, data, options

    def __call__(self, gone: Collection[int]) -> float:
        path = [i for i in range(self.model.stack.depth) if i not in gone]
        return language_modeling(self.model, self.data, **self.options, path=path).metrics["val_loss"]
