"""What each single change of each single layer costs in loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from layerwise.edit.quantization.engine import calibration_rows, enter
from layerwise.evaluate.batches import inference
from layerwise.models.model import Model
from layerwise.objectives.language import next_tokens, score_labels
from layerwise.plan.choice import Choice, Plan
from layerwise.stack.context import Context

Damages = dict[Choice, list[float]]
"""Single change -> loss added when it is done to layer 0, 1, ..., and to no other."""


def damages(
    model: Model,
    data: Any,
    moves: Sequence[Choice],
    make: Callable[[Plan], Model],
    *,
    samples: int = 64,
    batch: int = 16,
    split: str = "train",
    seed: int = 0,
    say: Callable[[str], None] = lambda message: None,
) -> Damages:
    """Loss on rows of a split with one layer changed, minus the loss of the model as it is, for every move and layer.

    A move is done to all layers at once (`make` does what a plan says), and its layers then stand in the model one at a time: what they were
    calibrated on is what enters them in a model changed throughout, and one walk serves all layers.
    """
    rows = calibration_rows(data, samples, batch, split, 1, seed + 1, model.device)
    whole = layer_losses(model, [], rows)[0]
    found: Damages = {}
    for move in moves:
        say(f"sensitivity: {move}")
        others = [None] * model.stack.depth if move.drop else list(make((move,) * model.stack.depth).eval().stack.layers)
        found[move] = [loss - whole for loss in layer_losses(model, others, rows)]
    return found


def layer_losses(model: Model, others: Sequence[Any], rows: Sequence[dict[str, Tensor]]) -> list[float]:
    """The loss with `others[i]` in the place of layer i (None: with nothing there), for each i; of no others, the model's own.

    The stream up to layer i is that of the model, so it is carried along and not computed again.
    """
    with inference(model):
        entered = [enter(model, r) for r in rows]
        streams = [x for x, _ in entered]
        contexts = [ctx for _, ctx in entered]
        layers = list(model.stack.layers)
        if not others:
            return [_loss(model, layers, 0, streams, contexts, rows)]
        losses = []
        for i, other in enumerate(others):
            changed = streams if other is None else [other(x, ctx, (i, 0)) for x, ctx in zip(streams, contexts, strict=True)]
            losses.append(_loss(model, layers, i + 1, changed, contexts, rows))
            streams = [layers[i](x, ctx, (i, 0)) for x, ctx in zip(streams, contexts, strict=True)]
        return losses


def _loss(
    model: Model, layers: list[Any], first: int, streams: Sequence[Tensor], contexts: Sequence[Context], rows: Sequence[dict[str, Tensor]]
) -> float:
    """Nats a token, of a stream that enters layer `first`."""
    total, count = 0.0, 0
    for x, ctx, row in zip(streams, contexts, rows, strict=True):
        for j in range(first, len(layers)):
            x = layers[j](x, ctx, (j, 0))
        hidden = x if model.stack.norm is None else model.stack.norm(x)
        loss = score_labels(model, hidden[:, :-1], next_tokens(row))
        total += float(loss.total)
        count += int(loss.count)
    return total / count
