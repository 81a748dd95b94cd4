"""What every objective can do besides computing a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from layerwise.analyze.findings import Findings


class Objective(nn.Module):
    """`forward(model, batch, generator, **context) -> Loss`, and moments of a training stage that an objective may want to know about.

    Its parameters (auxiliary heads) are trained with the model's and dropped when the stage ends.
    """

    one_process = False
    """It differentiates inside its forward pass, so several processes could not average the gradients."""

    def attach(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        """The stage begins; the optimizer is made afterwards. `batch` shows what the data looks like."""

    def before_step(self, step: int, total: int, divisor: float | None) -> None:
        """Step `step` of `total` begins.

        Args:
            divisor: what the sum of a micro-batch's losses is divided by before it is differentiated; None: its own number of items.
        """

    def finish(self, model: nn.Module, data: Any) -> Findings | None:
        """The stage ends: what only the objective can measure."""
        return None
