"""What changes of single layers do: to the loss, and to what the model makes of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layerwise.edit.quantization.engine import calibration_rows, enter
from layerwise.evaluate.batches import inference
from layerwise.models.model import Model, Output
from layerwise.plan.choice import Choice, Plan
from layerwise.plan.measure import Measure


@dataclass(frozen=True)
class Damage:
    """What a change costs, in the unit of the measure.

    Attributes:
        added: loss added. divergence: how far the output is from that of the model as it is: of predictions the Kullback-Leibler divergence,
            which is never negative and knows no chance of which token came, so a few rows tell it more exactly.
    """

    added: float
    divergence: float


Damages = dict[Choice, list[Damage]]
"""Single change -> what it does when it is done to layer 0, 1, ... (and to the table of tokens), and to nothing else."""
NONE = Damage(0.0, 0.0)


class Probe:
    """Rows of text, and what a model makes of them, with which layers in the place of its own are compared."""

    def __init__(
        self, model: Model, data: Any, measure: Measure, *, samples: int = 64, batch: int = 16, split: str = "train", seed: int = 0
    ) -> None:
        self.model = model
        self.targets = list(measure.targets(calibration_rows(data, samples, batch, split, 1, seed, model.device)))
        with inference(model):
            self.entered = [enter(model, target.rows) for target in self.targets]
            self.loss = self._compared([x for x, _ in self.entered], 0).added

    def of(self, others: Sequence[Any]) -> list[Damage]:
        """What `others[i]` in the place of layer i does (None: nothing there), for each i.

        The stream up to layer i is that of the model, so it is carried along and not computed again.
        """
        model, contexts = self.model, [ctx for _, ctx in self.entered]
        streams = [x for x, _ in self.entered]
        found = []
        with inference(model):
            for i, other in enumerate(others):
                changed = streams if other is None else [other(x, ctx, (i, 0)) for x, ctx in zip(streams, contexts, strict=True)]
                found.append(self._damage(changed, i + 1))
                streams = [model.stack.layers[i](x, ctx, (i, 0)) for x, ctx in zip(streams, contexts, strict=True)]
        return found

    def of_embedding(self, other: Model) -> Damage:
        """What the embedding of another model in the place of this one's does."""
        with inference(self.model), inference(other):
            return self._damage([enter(other, target.rows)[0] for target in self.targets], 0)

    def _damage(self, streams: Sequence[Tensor], first: int) -> Damage:
        one = self._compared(streams, first)
        return Damage(one.added - self.loss, one.divergence)

    def _compared(self, streams: Sequence[Tensor], first: int) -> Damage:
        """Loss and divergence of what the model's layers from `first` on make of streams, (b, s, width) each."""
        layers, norm = self.model.stack.layers, self.model.stack.norm
        loss, apart, count = 0.0, 0.0, 0
        for target, x, (_, ctx) in zip(self.targets, streams, self.entered, strict=True):
            for i in range(first, self.model.stack.depth):
                x = layers[i](x, ctx, (i, 0))
            mask = target.rows.get("attention_mask")
            out = Output(x if norm is None else norm(x), self.model, None if mask is None else mask.bool())
            here, away = target.compared(out)
            loss, apart, count = loss + here, apart + away, count + target.count
        return Damage(loss / count, max(apart / count, 0.0))


def damages(
    probe: Probe,
    moves: Sequence[Choice],
    make: Callable[[Plan], Model],
    say: Callable[[str], None] = lambda message: None,
) -> Damages:
    """What every move does to every layer, or to the table of tokens.

    A move is done to all layers at once (`make` does what a plan says), and its layers then stand in the model one at a time: what they were
    calibrated on is what enters them in a model changed throughout, and one walk serves all layers.
    """
    found: Damages = {}
    depth = probe.model.stack.depth
    table = [NONE] if any(move.tokens is not None for move in moves) else []
    for move in moves:
        say(f"sensitivity: {'tokens in ' if move.tokens else ''}{move}")
        if move.tokens is not None:
            found[move] = [*[NONE] * depth, probe.of_embedding(make((*[Choice()] * depth, move)))]
        else:
            others = [None] * depth if move.drop else list(make((move,) * depth).eval().stack.layers)
            found[move] = [*probe.of(others), *table]
    return found
