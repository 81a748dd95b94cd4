"""Stochastic depth for one stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from layerwise.errors import BadInput
from layerwise.stack.around import StochasticDepth
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class LayerDropout(Policy):
    """Stochastic depth for this stage only: layer i is skipped by a sample with probability rate * D(i) * S(t).

    `power` has D(i) = (i / (depth - 1)) ** power, `exponential` D(i) = 2 ** (i / (depth - 1)) - 1; both end at 1. S(t) is 1, or
    2 ** (t / (T - 1)) - 1, which rises from 0 to 1 over the stage.
    Source: Huang et al. 2016 (`power` 1, scaled); Elhoushi et al. 2024, "LayerSkip", section 4.1.1 (arXiv 2404.16710; `exponential`, not
    scaled, rising when a model is trained from scratch).

    Args:
        rate: probability at the top layer. power: 0 gives every layer the same, 1 (linear) is Huang et al. 2016.
        scale: branches that run are divided by 1 - p.
    """

    def __init__(
        self,
        *,
        rate: float = 0.1,
        power: float = 1.0,
        depths: Literal["power", "exponential"] = "power",
        rising: bool = False,
        scale: bool = True,
    ) -> None:
        if not 0 <= rate <= 1:
            raise BadInput(f"rate is a probability, between 0 and 1; it is {rate}")
        self.rate, self.power, self.depths, self.rising, self.scale = rate, power, depths, rising, scale
        self.drop = StochasticDepth([], scale=scale)

    def start(self, run: Run) -> None:
        self.around = (self.drop,)
        self.before_step(run)

    def before_step(self, run: Run) -> None:
        depth, top = run.model.stack.depth, self.rate
        if self.rising:
            top *= rise(run.step, run.total)
        shares = [rise(i, depth) if self.depths == "exponential" else (i / max(depth - 1, 1)) ** self.power for i in range(depth)]
        self.drop.rates = [top * share for share in shares]


def rise(i: int, count: int) -> float:
    """2 ** (i / (count - 1)) - 1: 0 at the first of `count` places, 1 at the last."""
    return 2 ** (i / max(count - 1, 1)) - 1
