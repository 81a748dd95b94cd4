"""Language modelling: predict the next token, or the masked ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.data.masking import mask_tokens
from layerwise.errors import BadInput
from layerwise.models.heads import LMHead
from layerwise.models.model import Model
from layerwise.objectives.cross_entropy import linear_cross_entropy
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective


def score_labels(model: Model, hidden: Tensor, labels: Tensor) -> Loss:
    """Cross-entropy of the lm head at the positions that have a label (-100: none); nothing is scored elsewhere.

    Args:
        hidden: (b, s, width). labels: (b, s).
    """
    head = model.head
    if not isinstance(head, LMHead):
        raise BadInput("this objective scores the vocabulary: give the model a head of kind lm")
    labelled = (labels != -100).flatten().nonzero().squeeze(1)
    features = head.features(hidden.flatten(0, 1)[labelled])
    total = linear_cross_entropy(features, head.matrix(model.token_matrix), labels.flatten()[labelled], head.bias)
    return Loss(total, torch.tensor(len(labelled), device=total.device))


def next_tokens(batch: Mapping[str, Any]) -> Tensor:
    """(b, s - 1) what every position but the last is to predict; -100 where nothing counts."""
    ids = batch["input_ids"]
    labels = batch.get("labels")
    if labels is None or labels.shape != ids.shape:
        labels = ids
        if (mask := batch.get("attention_mask")) is not None:
            labels = labels.masked_fill(mask == 0, -100)
    target = labels[:, 1:]
    if (segments := batch.get("segment_ids")) is not None:
        # The first token of a packed document has nothing before it that it could be predicted from.
        target = target.masked_fill(segments[:, 1:] != segments[:, :-1], -100)
    return target


class CausalLM(Objective):
    """Predict every token from those before it; `labels`, if the batch has them, say which count (-100: not)."""

    def __init__(self, data: Any = None) -> None:
        super().__init__()

    def forward(self, model: nn.Module, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        out = model(batch, **context)
        return score_labels(out.model, out.hidden[:, :-1], next_tokens(batch))


def check_rate(spec: ModelSpec | None = None, *, rate: float, **_: Any) -> None:
    """Raises BadInput: no share of tokens to predict, whatever the model."""
    if not 0 < rate < 1:
        raise BadInput(f"rate is the share of tokens to predict, between 0 and 1; it is {rate}")


class MaskedLM(Objective):
    """Predict the tokens that were masked, a fresh choice at every step. Source: Devlin et al. 2019, section 3.1.

    Args:
        data: gives the vocabulary and the mask token.
        rate: share of tokens to predict.
        replace: of those, shares that become the mask token, a random token, and stay.
    """

    def __init__(self, data: Any, *, rate: float = 0.15, replace: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> None:
        super().__init__()
        check_rate(rate=rate)
        if getattr(data, "mask_id", None) is None:
            raise BadInput("masked-lm needs a tokenizer with a mask token: use bpe, wordpiece or bytes")
        self.rate, self.replace, self.mask_id, self.vocab = rate, replace, data.mask_id, data.vocab
        special = [i for i in (data.pad_id, data.eos_id, data.cls_id, data.sep_id) if i is not None]
        self.special: Tensor
        self.register_buffer("special", torch.tensor(special, dtype=torch.long), persistent=False)

    def masked(self, batch: Mapping[str, Any], generator: torch.Generator | None) -> tuple[dict[str, Any], Tensor]:
        """The batch with tokens hidden, and their labels (-100: none)."""
        ids, labels = mask_tokens(
            batch["input_ids"],
            rate=self.rate,
            mask_id=self.mask_id,
            vocab=self.vocab,
            special_ids=self.special,
            generator=generator,
            attention_mask=batch.get("attention_mask"),
            replace=self.replace,
        )
        return {**batch, "input_ids": ids}, labels

    def forward(self, model: nn.Module, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        hidden, labels = self.masked(batch, generator)
        out = model(hidden, **context)
        return score_labels(out.model, out.hidden, labels)
