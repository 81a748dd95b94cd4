"""GaLore: Adam on gradients projected to a few of their own singular directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.optim.moments import adam_step


class GaLore(torch.optim.Optimizer):
    """Hidden matrices are updated by Adam in a subspace of their gradient; embedding, head and vectors by Adam as it is.

    With G (out, in) and out <= in: P holds the first `rank` left singular vectors of G, R = P^T G, and W <- W - lr scale P Adam(R);
    otherwise the right ones, R = G P. P is derived anew every `gap` steps; the moments stay when it changes, as in the authors' code.
    State of a projected matrix: 2 rank max(out, in) moments and rank min(out, in) for P.
    Source: Zhao et al. 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", algorithm 2 (arXiv 2403.03507).

    Args:
        params: groups with a `role` (see `layerwise.optim.roles`); without one, all matrices are hidden ones.
        rank: of the subspace; matrices that have no higher rank take Adam's step. gap: steps between projections.
        scale: alpha, of the projected update. betas, eps: Adam's.
    """

    by_role = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        gap: int = 200,
        scale: float = 0.25,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if rank < 1 or gap < 1 or scale <= 0:
            raise BadInput(f"rank and gap are at least 1 and scale is positive; got {rank}, {gap} and {scale}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "role": "matrix"})
        self.rank, self.gap, self.scale, self.betas, self.eps = rank, gap, scale, betas, eps

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            projected = [p for p in group["params"] if group["role"] == "matrix" and p.dim() == 2 and min(p.shape) > self.rank]
            chosen = {id(p) for p in projected}
            adam_step([p for p in group["params"] if id(p) not in chosen], self.state, lr, self.betas, self.eps, decay)
            for p in projected:
                if p.grad is not None:
                    p.mul_(1 - lr * decay).sub_(self._update(p.grad, self.state[p]), alpha=lr)
        return loss

    def _update(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        """scale P Adam(R), in the matrix's own space."""
        left = gradient.shape[0] <= gradient.shape[1]
        step = int(state.get("count", 0))
        if step % self.gap == 0:
            u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
            state["directions"] = (u[:, : self.rank] if left else vh[: self.rank].t()).contiguous().to(gradient.dtype)
        p = state["directions"]
        low = p.t() @ gradient if left else gradient @ p
        if "first" not in state:
            state["first"], state["second"] = torch.zeros_like(low), torch.zeros_like(low)
        state["count"] = torch.tensor(float(step + 1))
        one, two = self.betas
        state["first"].lerp_(low, 1 - one)
        state["second"].mul_(two).addcmul_(low, low, value=1 - two)
        mean = state["first"] / (1 - one ** (step + 1))
        made = mean / ((state["second"] / (1 - two ** (step + 1))).sqrt() + self.eps)
        return self.scale * (p @ made if left else made @ p.t())
