"""Learning to answer what a text asks, and nothing else of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.data.recall import ASKED
from layerwise.errors import BadInput
from layerwise.objectives.language import next_tokens, score_labels
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective


class Answers(Objective):
    """Predict the numbers behind the first question mark of a row; metric `accuracy` of their tokens.

    For texts whose other tokens are drawn at random (`builtin:key-values` and its like): their loss cannot fall, and hides that of the answers.

    Args:
        data: gives the tokenizer: a token of digits alone is part of a number.
    """

    def __init__(self, data: Any) -> None:
        super().__init__()
        if getattr(data, "tokenizer", None) is None:
            raise BadInput("answers reads text: the data needs a tokenizer")
        words = [data.tokenizer.decode([i], skip_special_tokens=False) for i in range(data.vocab)]
        self.number: Tensor
        self.asks: Tensor
        self.register_buffer("number", torch.tensor([word.strip().isdigit() for word in words]), persistent=False)
        self.register_buffer("asks", torch.tensor([ASKED in word for word in words]), persistent=False)

    def labels(self, ids: Tensor) -> Tensor:
        """The tokens of answers; -100 elsewhere."""
        return ids.masked_fill(~(self.number[ids] & (self.asks[ids].cumsum(dim=1) > 0)), -100)

    def forward(self, model: nn.Module, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        out = model(batch, **context)
        target = next_tokens({**batch, "labels": self.labels(batch["input_ids"])})
        loss = score_labels(out.model, out.hidden[:, :-1], target)
        with torch.no_grad():
            there = target != -100
            right = out.model.head(out.hidden[:, :-1][there], out.model.token_matrix).argmax(dim=-1) == target[there]
        loss.metrics["accuracy"] = right.sum()
        return loss
