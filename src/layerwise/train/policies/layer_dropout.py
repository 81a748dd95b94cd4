"""Stochastic depth for one stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerwise.stack.around import StochasticDepth
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class LayerDropout(Policy):
    """Stochastic depth for this stage only: layer i is skipped by a sample with probability rate * (i / (depth - 1)) ** power.

    Args:
        rate: probability at the top layer. power: 0 gives every layer the same, 1 (linear) is Huang et al. 2016.
    """

    def __init__(self, *, rate: float = 0.1, power: float = 1.0) -> None:
        self.rate, self.power = rate, power

    def start(self, run: Run) -> None:
        last = max(run.model.stack.depth - 1, 1)
        self.around = (StochasticDepth([self.rate * (i / last) ** self.power for i in range(run.model.stack.depth)]),)
