"""SCALE: plain descent along column-normalized gradients, with momentum for the head alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.optim.moments import adam_step
from layerwise.optim.normalize import Normalization, normalized, rms


class Scale(torch.optim.Optimizer):
    """Stochastic column-normalized last-layer momentum.

    Every matrix moves by lr times its gradient, each output unit's weights divided by their own root mean square; the head's gradient is
    averaged first, m <- beta m + (1 - beta) g. Vectors (norm gains, biases) take Adam's step. State: one number for each of the head's,
    two for each of a vector's, none for all the rest. Gradients of several micro-batches are summed before they come here.
    Source: Glentis et al. 2025, "A Minimalist Optimizer Design for LLM Pretraining" (arXiv 2506.16659), algorithm 1, in the form of its
    published code: root mean square and not norm, to which its learning rates belong; Adam without a second eps inside the root.

    Args:
        params: groups with a `role` (see `layerwise.optim.roles`); without one, matrices are hidden ones and have no momentum.
        lr: for matrices. vector_lr: Adam's rate for vectors at the peak of lr; it follows the same schedule.
        momentum: beta. momentum_on: whose gradients are averaged: the head's, nobody's or every matrix's (the paper's ablations).
        normalize: see `layerwise.optim.normalize`; `none` is plain descent.
        betas, eps: Adam's, for vectors.
    """

    by_role = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        vector_lr: float = 2e-2,
        momentum: float = 0.9,
        momentum_on: Literal["head", "none", "all"] = "head",
        normalize: Normalization = "column",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not 0 <= momentum < 1 or momentum_on not in ("head", "none", "all"):
            raise BadInput(f"momentum lies in [0, 1) and momentum_on is head, none or all; got {momentum} and {momentum_on}")
        if normalize not in ("column", "row", "sign", "spectral", "none"):
            raise BadInput(f"normalize is column, row, sign, spectral or none; got {normalize}")
        if vector_lr <= 0:
            raise BadInput(f"vector_lr must be positive; it is {vector_lr}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "role": "matrix"})
        self.vector_ratio = vector_lr / lr
        self.momentum, self.momentum_on, self.normalize = momentum, momentum_on, normalize
        self.betas, self.eps = betas, eps

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            adam_step([p for p in group["params"] if p.dim() < 2], self.state, lr * self.vector_ratio, self.betas, self.eps, decay)
            averaged = self.momentum_on == "all" or (self.momentum_on == "head" and group["role"] == "head")
            for p in group["params"]:
                if p.grad is None or p.dim() < 2:
                    continue
                direction = self._averaged(p, p.grad) if averaged else p.grad
                if decay:
                    p.mul_(1 - lr * decay)
                self._move(p, direction, lr, 0 if group["role"] == "embedding" else 1)
        return loss

    def _averaged(self, p: Tensor, gradient: Tensor) -> Tensor:
        if "mean" not in self.state[p]:
            self.state[p]["mean"] = torch.zeros_like(gradient)
        return self.state[p]["mean"].lerp_(gradient, 1 - self.momentum)

    def _move(self, p: Tensor, direction: Tensor, lr: float, inputs: int) -> None:
        flat, weight = direction.flatten(1), p.view(p.shape[0], -1)
        if self.normalize == "column":  # in one sweep, without a second tensor of that size
            weight.addcdiv_(flat, rms(flat, inputs).expand_as(flat), value=-lr)
        else:
            weight.add_(normalized(flat, self.normalize, inputs), alpha=-lr)
