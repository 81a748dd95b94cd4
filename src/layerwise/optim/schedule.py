"""The learning rate at a step: a pure function, so a resumed run needs no state for it."""

from __future__ import annotations

import math

from layerwise.optim.spec import ScheduleSpec


def warmup_steps(spec: ScheduleSpec, total: int) -> int:
    """Steps of linear warm-up in a stage of `total` steps."""
    return int(spec.warmup if spec.warmup >= 1 else round(spec.warmup * total))


def factor(spec: ScheduleSpec, step: float, total: int) -> float:
    """The factor of the peak learning rate that step `step` (0-based; a fraction where a policy runs the clock) of `total` uses.

    Sources: Loshchilov & Hutter 2017 (cosine); Hu et al. 2024, "MiniCPM" (wsd); Vaswani et al. 2017 (inverse square root).
    """
    if spec.part != (0.0, 1.0):  # the stage lies in a longer schedule
        first, last = spec.part
        whole = round(total / (last - first))
        step, total = step + round(first * whole), whole
    warm = warmup_steps(spec, total)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if spec.name == "cosine":
        return spec.floor + (1 - spec.floor) * (1 + math.cos(math.pi * done)) / 2
    if spec.name == "linear":
        return 1 - (1 - spec.floor) * done
    if spec.name == "wsd":
        fall = (step - (1 - spec.decay) * total) / (spec.decay * total)
        return 1 - (1 - spec.floor) * max(0.0, fall)
    if spec.name == "inverse-sqrt":
        return (max(warm, 1) / (step + 1)) ** 0.5 if step >= warm else 1.0
    if spec.name == "drops":
        return math.prod(by for at, by in spec.drops.items() if step >= at * total)
    return 1.0
