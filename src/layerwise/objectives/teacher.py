"""A frozen model that another one learns from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from layerwise.models.load import load_any
from layerwise.models.model import Model, Output


class Teacher:
    """Runs once a batch, without gradients and without dropout. It is no module, so it is in no checkpoint and no optimizer.

    Args:
        model: a checkpoint's folder, loaded when it is first needed, or a model.
    """

    def __init__(self, model: str | Path | Model) -> None:
        self._model = model if isinstance(model, Model) else None
        self._folder = None if isinstance(model, Model) else model

    def model(self, device: torch.device) -> Model:
        """The teacher, in evaluation mode on `device`."""
        if self._model is None:
            assert self._folder is not None
            self._model = load_any(self._folder, str(device))
        if self._model.device != device:
            self._model = self._model.to(device)
        return self._model.eval()

    def __call__(self, batch: Mapping[str, Any], device: torch.device, **context: Any) -> Output:
        """The teacher's output on `batch`, on `device`."""
        with torch.no_grad():
            return self.model(device)(batch, **context)
