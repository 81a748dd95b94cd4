"""What changes of single layers do: to the loss, and to the predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layerwise.edit.quantization.engine import calibration_rows, enter
from layerwise.evaluate.batches import inference
from layerwise.models.model import Model
from layerwise.objectives.language import next_tokens
from layerwise.plan.choice import Choice, Plan

NUMBERS = 2**24
"""Most scores that are held at a time; four times as many of the model's own are kept, if that is all of them."""


@dataclass(frozen=True)
class Damage:
    """What a change costs, in nats a token.

    Attributes:
        added: loss added. divergence: Kullback-Leibler divergence of the predictions from those of the model as it is. It is never
            negative and knows no chance of which token came, so a few rows tell it more exactly.
    """

    added: float
    divergence: float


Damages = dict[Choice, list[Damage]]
"""Single change -> what it does when it is done to layer 0, 1, ..., and to no other."""


class Probe:
    """Rows of text, and a model's predictions on them, with which layers in the place of its own are compared."""

    def __init__(self, model: Model, data: Any, *, samples: int = 64, batch: int = 16, split: str = "train", seed: int = 0) -> None:
        self.model = model
        rows = calibration_rows(data, samples, batch, split, 1, seed, model.device)
        self.labels = [next_tokens(row) for row in rows]
        with inference(model):
            self.entered = [enter(model, row) for row in rows]
            self.hidden = [self._hidden(x, 0, ctx) for x, ctx in self.entered]
            scores = sum(h.shape[0] * h.shape[1] for h in self.hidden) * len(model.token_matrix)
            self._kept = [self._scores(h) for h in self.hidden] if scores <= 4 * NUMBERS else None
            self.loss = self._compared(self.hidden).added

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
                one = self._compared([self._hidden(x, i + 1, ctx) for x, ctx in zip(changed, contexts, strict=True)])
                found.append(Damage(one.added - self.loss, one.divergence))
                streams = [model.stack.layers[i](x, ctx, (i, 0)) for x, ctx in zip(streams, contexts, strict=True)]
        return found

    def _hidden(self, x: Tensor, first: int, ctx: Any) -> Tensor:
        """What the model's layers from `first` on make of a stream, (b, s - 1, width): at the positions before each token."""
        for i in range(first, self.model.stack.depth):
            x = self.model.stack.layers[i](x, ctx, (i, 0))
        return (x if self.model.stack.norm is None else self.model.stack.norm(x))[:, :-1]

    def _scores(self, hidden: Tensor) -> Tensor:
        head: Any = self.model.head
        return head(hidden, self.model.token_matrix).float().log_softmax(dim=-1)

    def _compared(self, made: Sequence[Tensor]) -> Damage:
        """Loss and divergence of what other layers made."""
        loss, apart, count = 0.0, 0.0, 0
        for label, ours, theirs in self._pieces(made):
            real = label != -100
            loss -= float(theirs.gather(-1, label.clamp(min=0)[..., None]).squeeze(-1)[real].double().sum())
            apart += float((ours.exp() * (ours - theirs)).sum(dim=-1)[real].double().sum())
            count += int(real.sum())
        return Damage(loss / count, max(apart / count, 0.0))

    def _pieces(self, made: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Labels, and log-probabilities of the model and of the other, a few rows at a time."""
        step = max(1, NUMBERS // (len(self.model.token_matrix) * self.labels[0].shape[1]))
        for b, (hidden, label) in enumerate(zip(made, self.labels, strict=True)):
            for first in range(0, len(hidden), step):
                part = slice(first, first + step)
                ours = self._kept[b][part] if self._kept is not None else self._scores(self.hidden[b][part])
                yield label[part], ours, self._scores(hidden[part])


def damages(
    probe: Probe,
    moves: Sequence[Choice],
    make: Callable[[Plan], Model],
    say: Callable[[str], None] = lambda message: None,
) -> Damages:
    """What every move does to every layer.

    A move is done to all layers at once (`make` does what a plan says), and its layers then stand in the model one at a time: what they were
    calibrated on is what enters them in a model changed throughout, and one walk serves all layers.
    """
    found: Damages = {}
    depth = probe.model.stack.depth
    for move in moves:
        say(f"sensitivity: {move}")
        found[move] = probe.of([None] * depth if move.drop else list(make((move,) * depth).eval().stack.layers))
    return found
