"""What is to stay of a model, by its kind: what changes damage, and what a plan is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.evaluate.batches import inference
from layerwise.models.model import Model, Output
from layerwise.models.spec import ModelSpec
from layerwise.objectives.language import MaskedLM, next_tokens, score_labels

NUMBERS = 2**24
"""Most scores of a vocabulary that are made at a time; the model's own of a batch are kept if they are no more."""

Rows = dict[str, Tensor]


class Target(Protocol):
    """A batch of rows, and what a model is to make of them.

    Attributes:
        rows: what the model reads. count: of how many tokens, or texts, losses and divergences are sums.
    """

    rows: Rows
    count: int

    def loss(self, out: Output) -> float:
        """What a plan is judged by, of an output for these rows."""
        ...

    def compared(self, out: Output) -> tuple[float, float]:
        """The loss, and how far the output is from that of the model as it is."""
        ...


class Tokens:
    """Tokens to predict: the loss is the cross-entropy, the distance the Kullback-Leibler divergence of the predictions.

    Args:
        labels: (b, s), -100 where nothing counts.
    """

    def __init__(self, model: Model, rows: Rows, labels: Tensor) -> None:
        self.model, self.rows, self.labels = model, rows, labels
        self.places = (labels != -100).flatten().nonzero().squeeze(1)
        self.count = len(self.places)

    def loss(self, out: Output) -> float:
        return float(score_labels(out.model, out.hidden, self.labels).total)

    def compared(self, out: Output) -> tuple[float, float]:
        hidden, labels = self._there(out), self.labels.flatten()[self.places]
        step = max(1, NUMBERS // self._vocab)
        loss, apart = 0.0, 0.0
        for first in range(0, self.count, step):
            part = slice(first, first + step)
            ours = self._scores(self.model, self._hidden[part]) if self._kept is None else self._kept[part]
            theirs = self._scores(out.model, hidden[part])
            loss -= float(theirs.gather(-1, labels[part, None]).double().sum())
            apart += float((ours.exp() * (ours - theirs)).sum(dim=-1).double().sum())
        return loss, apart

    @cached_property
    def _hidden(self) -> Tensor:
        """(count, width) of the model as it is."""
        with inference(self.model):
            return self._there(self.model(self.rows))

    @cached_property
    def _kept(self) -> Tensor | None:
        return self._scores(self.model, self._hidden) if self.count * self._vocab <= NUMBERS else None

    @property
    def _vocab(self) -> int:
        return len(self.model.token_matrix)

    def _there(self, out: Output) -> Tensor:
        return out.hidden.flatten(0, 1)[self.places]

    @staticmethod
    def _scores(model: Model, hidden: Tensor) -> Tensor:
        head: Any = model.head
        return head(hidden, model.token_matrix).float().log_softmax(dim=-1)


class Vectors:
    """The vector of every text, its positions pooled: 1 - cosine to that of the model as it is, which is loss and distance in one."""

    def __init__(self, model: Model, rows: Rows) -> None:
        self.rows = rows
        with inference(model):
            self.vectors = model(rows).pooled.float()
        self.count = len(self.vectors)

    def loss(self, out: Output) -> float:
        return float((1 - F.cosine_similarity(out.pooled.float(), self.vectors, dim=-1)).double().sum())

    def compared(self, out: Output) -> tuple[float, float]:
        loss = self.loss(out)
        return loss, loss


def next_token_targets(model: Model, batches: Iterable[Rows]) -> Iterator[Target]:
    """Every token is predicted from those before it."""
    for rows in batches:
        yield Tokens(model, rows, F.pad(next_tokens(rows), (0, 1), value=-100))


def masked_token_targets(model: Model, objective: MaskedLM, batches: Iterable[Rows]) -> Iterator[Target]:
    """What is masked is predicted: the same tokens whenever these batches come."""
    generator = torch.Generator(device=model.device).manual_seed(0)
    for rows in batches:
        yield Tokens(model, *objective.masked(rows, generator))


def vector_targets(model: Model, batches: Iterable[Rows]) -> Iterator[Target]:
    """The vectors of texts stay."""
    for rows in batches:
        yield Vectors(model, rows)


@dataclass(frozen=True)
class Measure:
    """How one kind of model is measured.

    Attributes:
        name, unit: of the loss. targets: of batches of rows.
        evaluation, training: the stages of a job that measure a model and that train it.
        scores: what heads and channels are scored by, where it is not the loss of the next token; see `How`.
    """

    name: str
    unit: str
    targets: Callable[[Iterable[Rows]], Iterator[Target]]
    evaluation: dict[str, Any]
    training: dict[str, Any]
    scores: dict[str, Any] = field(default_factory=dict)


def check_measurable(spec: ModelSpec) -> None:
    """Raises BadInput: a model of this description has none of the measures here."""
    if spec.decoder is not None:
        raise BadInput("a plan is made for one stack of layers; this model is an encoder-decoder")
    scores = spec.head is not None and spec.head.kind == "lm"
    if not isinstance(spec.embedding, TokenSpec) or not (scores or (spec.head is None and not spec.causal)):
        raise BadInput("a plan is made for models of text with a head of kind lm, and for encoders of text without a head")
    if spec.head is None:
        _ = spec.pooling


def measure_for(model: Model, data: Any, source: str) -> Measure:
    """How a model is measured.

    Args:
        source: the folder that it is in, which further stages of a job compare with.

    Raises:
        BadInput: see `check_measurable`; or the tokenizer has no token that masks others.
    """
    check_measurable(model.spec)
    if model.spec.head is None:
        agreement, distillation = {"evaluate": "embedding-agreement", "other": source}, {"train": "hidden-distillation"}
        return Measure(
            "sentence vectors", "1 - cosine", partial(vector_targets, model), agreement, {**distillation, "options": {"teacher": source}},
            {"by": "activation"},
        )  # fmt: skip
    if model.spec.causal:
        language = {"evaluate": "language-modeling"}
        return Measure("next tokens", "nats a token", partial(next_token_targets, model), language, {"train": "causal-lm"})
    return Measure(
        "masked tokens", "nats a token", partial(masked_token_targets, model, MaskedLM(data).to(model.device)), {"evaluate": "masked-lm"},
        {"train": "masked-lm"}, {"objective": "masked-lm"},
    )  # fmt: skip
