"""Running a model on behalf of one objective while another looks at what came out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerwise.models.model import Model, Output


class Overheard:
    """Stands for a model in an objective's eyes; keeps the batch it was last run on and what it made.

    Args:
        hiddens: every layer's output is kept too.
    """

    batch: Mapping[str, Any]
    output: Output

    def __init__(self, model: Model, *, hiddens: bool = False) -> None:
        self._model, self._hiddens = model, hiddens

    def __call__(self, batch: Mapping[str, Any], **context: Any) -> Output:
        self.batch = batch
        self.output = self._model(batch, **{"hiddens": self._hiddens, **context})
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
