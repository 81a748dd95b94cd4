"""Adam's update, for the parameters that an optimizer does not treat in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def adam_step(
    parameters: Sequence[Tensor], state: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
) -> None:
    """One step of Adam with decoupled weight decay on `parameters` that have a gradient, all at once.

    p <- (1 - lr wd) p - lr (sqrt(1 - b2^t) / (1 - b1^t)) m / (sqrt(v) + eps): eps stands beside the uncorrected root, as in
    Kingma and Ba 2015, end of section 2. `torch.optim.Adam` has it beside the corrected one.

    Args:
        state: an optimizer's state, a mapping from parameter to its entries; it gets `step`, `exp_avg` and `exp_avg_sq`.
    """
    live = [p for p in parameters if p.grad is not None]
    for p in live:
        if not state[p]:
            state[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state[p]["step"] = int(state[p]["step"]) + 1
    by_step: dict[int, list[Tensor]] = {}
    for p in live:
        by_step.setdefault(state[p]["step"], []).append(p)
    for step, group in by_step.items():
        gradients = [p.grad for p in group if p.grad is not None]
        means, squares = [state[p]["exp_avg"] for p in group], [state[p]["exp_avg_sq"] for p in group]
        torch._foreach_lerp_(means, gradients, 1 - betas[0])
        torch._foreach_mul_(squares, betas[1])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - betas[1])
        below = torch._foreach_sqrt(squares)
        torch._foreach_add_(below, eps)
        if weight_decay:
            torch._foreach_mul_(group, 1 - lr * weight_decay)
        torch._foreach_addcdiv_(group, means, below, -lr * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step))
