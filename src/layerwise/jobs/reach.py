"""What it costs each arm to reach a loss: the one its seed's reference arm ends with, or a fixed one."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

Curve = list[dict[str, Any]]


class Reach(BaseModel):
    """A metric `stage.NAME` that compares arms: the cost at which a training stage first measured a loss this low.

    Attributes:
        stage: the training stage whose curve is read.
        target: a variant, whose last value of `loss` in that stage is the target of each seed; or a number.
        loss: the column that is to fall. cost: the column that is read (`step`, `tokens`, `seconds`, or one that a policy logs).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    target: str | float
    loss: str = "val_loss"
    cost: str = "step"


def final(curve: Curve, loss: str) -> float | None:
    """The last value of a column."""
    values = [line[loss] for line in curve if loss in line]
    return values[-1] if values else None


def reached(curve: Curve, target: float, loss: str, cost: str) -> float | None:
    """The cost at which `loss` is first at most `target`, on the straight line between neighbouring measurements; None if it never is."""
    before: tuple[float, float] | None = None
    for line in curve:
        if loss not in line or cost not in line:
            continue
        value, spent = float(line[loss]), float(line[cost])
        if value <= target:
            if before is None or value == target:
                return spent
            share = (before[0] - target) / (before[0] - value)
            return before[1] + share * (spent - before[1])
        before = value, spent
    return None
