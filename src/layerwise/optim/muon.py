"""Muon: hidden matrices move along their orthogonalized momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from layerwise.errors import BadInput
from layerwise.optim.moments import adam_step
from layerwise.optim.normalize import orthogonalized


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is brought to singular values near 1; embedding, head and vectors take Adam's step.

    m <- beta m + (1 - beta) g;  u = orthogonalized((1 - beta) g + beta m);  W <- (1 - lr wd) W - lr 0.2 sqrt(max(out, in)) u

    The factor gives updates the root mean square of Adam's, so that both can share one learning rate. State: one number for each
    of a hidden matrix's, two for each of the others'. Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural
    networks"; Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2 (the factor).

    Args:
        params: groups with a `role` (see `layerwise.optim.roles`); without one, all matrices are hidden ones.
        lr: of both. momentum: beta. steps: Newton-Schulz iterations. betas, eps: Adam's.
    """

    by_role = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        if not 0 <= momentum < 1 or steps < 1:
            raise BadInput(f"momentum lies in [0, 1) and steps is at least 1; got {momentum} and {steps}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "role": "matrix"})
        self.momentum, self.steps, self.betas, self.eps = momentum, steps, betas, eps

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            hidden = [p for p in group["params"] if p.dim() >= 2 and group["role"] == "matrix"]
            others = [p for p in group["params"] if p.dim() < 2 or group["role"] != "matrix"]
            adam_step(others, self.state, lr, self.betas, self.eps, decay)
            for p in hidden:
                if p.grad is None:
                    continue
                if "mean" not in self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"].lerp_(p.grad, 1 - self.momentum)
                update = orthogonalized(p.grad.lerp(mean, self.momentum).flatten(1), self.steps)
                if decay:
                    p.mul_(1 - lr * decay)
                p.view(p.shape[0], -1).add_(update, alpha=-lr * 0.2 * max(update.shape) ** 0.5)
        return loss
