"""SGD whose loss gradient reaches only the globally most important weights; all others decay towards zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.errors import BadInput


class GSM(torch.optim.Optimizer):
    """Global sparse momentum SGD.

    With g the gradient of the plain loss, T = |w g| and B = 1 where T is among the Q = floor(n / ratio) largest of all n kernel weights:

        z <- momentum z + weight_decay w + B g;    w <- w - lr z

    (Nesterov's variant steps by weight_decay w + B g + momentum z.) Parameters of one dimension get the whole gradient. A kernel
    that is all zero scores zero and cannot come back.

    Source: Ding et al. 2019, "Global Sparse Momentum SGD for Pruning Very Deep Neural Networks", equations 7-9 (arXiv 1909.12778).

    Args:
        params, lr, weight_decay: as usual; the decay is coupled into the momentum, which is what makes it act 1/(1 - momentum) times.
        ratio: how many times fewer weights are to remain.
        scope: one threshold over all kernels, or (`layer`) one for each.
    """

    together = True
    """A step needs the gradients of all parameters at once."""

    def __init__(
        self,
        params: Any,
        lr: float = 5e-3,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.98,
        ratio: float = 10.0,
        nesterov: bool = False,
        scope: Literal["global", "layer"] = "global",
    ) -> None:
        if ratio < 1 or not 0 <= momentum < 1:
            raise BadInput(f"gsm needs ratio >= 1 and momentum in [0, 1); got {ratio} and {momentum}")
        if scope not in ("global", "layer"):
            raise BadInput(f"scope is global or layer; got '{scope}'")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.momentum, self.ratio, self.nesterov, self.scope = momentum, ratio, nesterov, scope

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        kernels = [p for group in self.param_groups for p in group["params"] if p.grad is not None and p.dim() in (2, 4)]
        active = dict(zip(kernels, active_masks([p * p.grad for p in kernels], self.ratio, self.scope), strict=True))
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                step = p.grad * active[p] if p in active else p.grad
                if group["weight_decay"]:
                    step = step.add(p, alpha=group["weight_decay"])
                if self.momentum:
                    state = self.state[p]
                    buffer = state["momentum_buffer"] = (
                        step.clone() if "momentum_buffer" not in state else state["momentum_buffer"].mul_(self.momentum).add_(step)
                    )
                    step = step.add(buffer, alpha=self.momentum) if self.nesterov else buffer
                p.add_(step, alpha=-group["lr"])
        return loss


def active_masks(products: list[Tensor], ratio: float, scope: str = "global") -> list[Tensor]:
    """1 where |w g| is among the floor(n / ratio) largest of all products (or of each one's own), 0 elsewhere; ties are kept.

    Args:
        products: w g of every kernel.
    """
    scores = [p.abs() for p in products]
    if scope == "layer":
        return [(s >= _threshold(s.flatten(), ratio)).to(s.dtype) for s in scores]
    if not scores:
        return []
    threshold = _threshold(torch.cat([s.flatten() for s in scores]), ratio)
    return [(s >= threshold).to(s.dtype) for s in scores]


def _threshold(scores: Tensor, ratio: float) -> Tensor:
    """The floor(n / ratio)-th largest score."""
    kept = max(int(len(scores) / ratio), 1)
    return scores.kthvalue(len(scores) - kept + 1).values
