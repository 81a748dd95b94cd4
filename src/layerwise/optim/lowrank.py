"""Adam whose moments live in a small projection of each matrix's gradient: GaLore, Fira and APOLLO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.optim.moments import adam_step

LIMIT = 1.01
"""How much the norm of a scaled gradient may grow from step to step (Chen et al. 2024, section 3.3)."""


class _Projected(torch.optim.Optimizer):
    """Hidden matrices with more than `rank` rows and columns are treated in a projection; everything else takes Adam's step.

    A matrix is handled lying down, (short, long) with short <= long, and a square one on its side, as in the published code of all
    three; `R` is its gradient's projection, (rank, long). `Adam(R)` is its moments' quotient m / (sqrt(v) + eps) as it is: the bias
    of both moments is corrected in the step's size, after norms were limited.
    """

    by_role = True

    def __init__(
        self, params: Any, lr: float, weight_decay: float, rank: int, gap: int, scale: float, betas: tuple[float, float], eps: float
    ) -> None:
        if rank < 1 or gap < 1 or scale <= 0:
            raise BadInput(f"rank and gap are at least 1 and scale is above 0; got {rank}, {gap} and {scale}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "role": "matrix"})
        self.rank, self.gap, self.scale, self.betas, self.eps = rank, gap, scale, betas, eps
        self._number = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            small = [p for p in group["params"] if p.dim() != 2 or group["role"] != "matrix" or min(p.shape) <= self.rank]
            adam_step(small, self.state, lr, self.betas, self.eps, decay)
            rest = {id(p) for p in small}
            for p in group["params"]:
                if id(p) in rest or p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = int(state.get("step", 0)) + 1
                upright = p.shape[0] >= p.shape[1]
                update = self._update(p.grad.T if upright else p.grad, state, self._number[p])
                if decay:
                    p.mul_(1 - lr * decay)
                first, second = self.betas
                corrected = lr * (1 - second ** state["step"]) ** 0.5 / (1 - first ** state["step"])
                p.add_(update.T if upright else update, alpha=-corrected)
        return loss

    def _update(self, gradient: Float[Tensor, "short long"], state: dict[str, Any], number: int) -> Float[Tensor, "short long"]:
        raise NotImplementedError

    def _moments(self, small: Tensor, state: dict[str, Any]) -> Tensor:
        """Adam's direction for the projected gradient, bias uncorrected; its moments stay in `state`."""
        first, second = self.betas
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(small), torch.zeros_like(small)
        state["exp_avg"].lerp_(small, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(small, small, value=1 - second)
        return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + self.eps)


class GaLore(_Projected):
    """R = P^T G;  W <- W - lr scale P Adam(R), P the first left singular vectors of G, renewed every `gap` steps.

    Source: Zhao et al. 2024, "GaLore", algorithm 2 (arXiv 2403.03507).

    Args:
        params: groups with a `role`. rank: of P. gap: T. scale: alpha. betas, eps: Adam's.
    """

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
        super().__init__(params, lr, weight_decay, rank, gap, scale, betas, eps)

    def _update(self, gradient: Tensor, state: dict[str, Any], number: int) -> Tensor:
        basis = self._basis(gradient, state)
        return self.scale * basis @ self._moments(basis.T @ gradient, state)

    def _basis(self, gradient: Tensor, state: dict[str, Any]) -> Float[Tensor, "short rank"]:
        if "basis" not in state or (state["step"] - 1) % self.gap == 0:
            exact = gradient if gradient.dtype == torch.float64 else gradient.float()
            state["basis"] = torch.linalg.svd(exact, full_matrices=False).U[:, : self.rank].to(gradient.dtype).contiguous()
        return state["basis"]


class Fira(GaLore):
    """GaLore, plus what the projection leaves out, scaled column by column as Adam scaled the projection.

    W <- W - lr (scale P N + phi (G - scale P R)), N = Adam(R), phi_j = |N_j| / |R_j|; the second term's norm grows by at most 1 %
    a step.

    Source: Chen et al. 2024, "Fira", equations 6-9 (arXiv 2410.01623); the scale stands where its published code has it.

    Args:
        as for GaLore.
    """

    def _update(self, gradient: Tensor, state: dict[str, Any], number: int) -> Tensor:
        basis = self._basis(gradient, state)
        small = basis.T @ gradient
        adapted = self._moments(small, state)
        factors = adapted.norm(dim=0) / (small.norm(dim=0) + 1e-8)
        back = self.scale * basis
        return back @ adapted + limited((gradient - back @ small) * factors, state)


class APOLLO(_Projected):
    """The gradient itself, each column (or the whole matrix) scaled by how Adam scales a random projection of it.

    R = P G with P ~ N(0, 1/rank), drawn anew every `gap` steps and never stored;  s = |Adam(R)| / |R|;  W <- W - lr scale s G, whose
    norm grows by at most 1 % a step.

    Source: Zhu et al. 2024, "APOLLO: SGD-like Memory, AdamW-level Performance", algorithm 1 (arXiv 2412.05270); its Mini form is
    rank 1, scope `tensor` and scale sqrt(128).

    Args:
        params: groups with a `role`. rank, gap, betas, eps: as above. scale: alpha. scope: of s. seed: of the projections.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        gap: int = 200,
        scale: float = 1.0,
        scope: Literal["channel", "tensor"] = "channel",
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if scope not in ("channel", "tensor"):
            raise BadInput(f"scope is channel or tensor; got '{scope}'")
        super().__init__(params, lr, weight_decay, rank, gap, scale, betas, eps)
        self.scope, self.seed = scope, seed

    def _update(self, gradient: Tensor, state: dict[str, Any], number: int) -> Tensor:
        small = self._sketch(gradient, (state["step"] - 1) // self.gap, number) @ gradient * self.rank**-0.5
        adapted = self._moments(small, state)
        over = 0 if self.scope == "channel" else (0, 1)
        factors = torch.linalg.vector_norm(adapted, dim=over) / (torch.linalg.vector_norm(small, dim=over) + 1e-8)
        return self.scale * limited(gradient * factors, state)

    def _sketch(self, gradient: Tensor, renewed: int, number: int) -> Float[Tensor, "rank short"]:
        """sqrt(rank) P^T of one matrix."""
        generator = torch.Generator(device=gradient.device).manual_seed((self.seed * 1_000_003 + number) * 1_000_003 + renewed)
        return torch.randn(self.rank, gradient.shape[0], generator=generator, device=gradient.device, dtype=gradient.dtype)


def limited(update: Tensor, state: dict[str, Any]) -> Tensor:
    """`update`, shortened if its norm grew by more than `LIMIT` since the last step; `state` remembers the norm."""
    norm = update.norm()
    if "norm" in state:
        shorter = torch.minimum(torch.ones_like(norm), LIMIT * (state["norm"] + 1e-8) / norm.clamp(min=1e-30))
        update, norm = update * shorter, norm * shorter
    state["norm"] = norm
    return update
