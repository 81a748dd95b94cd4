"""What an objective returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Loss:
    """A loss as a sum over items and how many items there were.

    Keeping them apart lets the loop take the exact mean over several micro-batches or processes, whose numbers of items
    (labelled tokens, boxes) differ.

    Attributes:
        total: sum over the items, with gradient.
        count: number of items.
        metrics: further sums over the same items, by name, without gradient (correct predictions, parts of the loss).
        applied: the gradients are in place already (an objective that differentiates layer by layer).
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    applied: bool = False

    @property
    def mean(self) -> Tensor:
        return self.total / self.count.clamp(min=1)
