"""How parameters are updated and how the learning rate moves: plain data, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from layerwise.complaint import FORBID
from layerwise.errors import BadInput
from layerwise.optim import OPTIMIZERS
from layerwise.table import unknown


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer and who gets which learning rate.

    Attributes:
        name: an entry of `layerwise.optim.OPTIMIZERS`.
        lr: peak learning rate (for Layca: the rotation per step, its rho).
        weight_decay: on matrices only; vectors (norm gains, biases) never decay.
        layer_decay: the learning rate is multiplied by this once for every layer that lies above (1: all alike).
        depth_lr: index or slice -> multiplier of the learning rate of those layers.
        options: further arguments of the optimizer (`betas`, `momentum`, `inner`, ...).
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    depth_lr: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise unknown(self.name, OPTIMIZERS, "optimizer")
        if self.lr <= 0:
            raise BadInput(f"lr must be positive; it is {self.lr}")
        if self.weight_decay < 0 or not 0 < self.layer_decay <= 1:
            raise BadInput(f"weight_decay is >= 0 and layer_decay in (0, 1]; got {self.weight_decay} and {self.layer_decay}")


@dataclass(frozen=True)
class ScheduleSpec:
    """The learning rate over a stage, as a factor of its peak.

    Attributes:
        name: what happens after the warm-up: `cosine` or `linear` to `floor`; `wsd` stays at 1 and falls linearly to
            `floor` over the last `decay` share; `constant`; `inverse-sqrt` falls like 1/sqrt(step); `drops` multiplies at
            given points.
        warmup: linear from 0: a number of steps, or a share of all steps when below 1.
        floor: final factor.
        decay: share of the steps in which `wsd` falls.
        drops: share of the steps done -> factor from there on (`{0.8: 0.2}`).
        part: of a schedule over several stages, the shares where this stage begins and ends: the second of five equal stages has
            [0.2, 0.4]. Warm-up and decay are those of the whole.
    """

    name: Literal["cosine", "linear", "wsd", "constant", "inverse-sqrt", "drops"] = "cosine"
    warmup: float = 0.1
    floor: float = 0.1
    decay: float = 0.2
    drops: dict[float, float] = field(default_factory=dict)
    part: tuple[float, float] = (0.0, 1.0)

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.warmup < 0 or not 0 <= self.floor <= 1 or not 0 < self.decay <= 1:
            raise BadInput(f"warmup >= 0, floor in [0, 1], decay in (0, 1]; got {self.warmup}, {self.floor}, {self.decay}")
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise BadInput(
                f"part holds two rising shares in [0, 1], where a stage begins and ends in a longer schedule; got {list(self.part)}"
            )
        if any(not 0 <= at <= 1 for at in self.drops):
            raise BadInput(f"drops are keyed by the share of steps done, in [0, 1]; got {sorted(self.drops)}")
