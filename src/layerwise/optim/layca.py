"""Layca: every layer's weight vector turns by a set angle each step, whatever optimizer proposes the direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.table import lookup

INNER = {"sgd": "torch.optim:SGD", "adam": "torch.optim:Adam", "rmsprop": "torch.optim:RMSprop", "adagrad": "torch.optim:Adagrad"}


def rotation_profile(alpha: float, layers: int) -> list[float]:
    """Factor of the rotation rate for each layer, input first: alpha > 0 slows early layers, alpha < 0 late ones.

    alpha > 0: (1 - alpha)^(5 (L-1-i)/(L-1)); alpha <= 0: (1 + alpha)^(5 i/(L-1)).
    """
    if not -1 < alpha < 1:
        raise BadInput(f"alpha lies strictly between -1 and 1; it is {alpha}")
    last = max(layers - 1, 1)
    base = 1 - abs(alpha)
    return [base ** (5 * ((last - i) if alpha > 0 else i) / last) for i in range(layers)]


class Layca(torch.optim.Optimizer):
    """Layer-level controlled amount of weight rotation.

    The inner optimizer proposes a step u for a layer's weight w (so w - u would be next). Then

        u <- u - (<u, w> / |w|^2) w;  u <- u |w| / |u|;  w' = w - rho u;  w <- w' |w| / |w'|

    keeps |w| and turns w by exactly arctan(rho). A layer is a parameter with two dimensions or more, taken as one vector.
    Source: Carbonnelle and De Vleeschouwer 2018, "Layer rotation: a surprisingly powerful indicator of generalization in
    deep networks?", section 3 (arXiv 1806.01603).

    Args:
        params: parameters or groups.
        lr: rho, the tangent of the angle a step turns a layer by.
        alpha: profile over layers, see `rotation_profile`.
        inner: the optimizer that proposes the direction, an entry of `INNER`; inner_options are its arguments.
        train_rest: also train parameters with one dimension, by the inner optimizer with `rest_lr`. The paper does not.
        eps: a proposed step that is no longer than this is no step.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3**-3,
        weight_decay: float = 0.0,
        *,
        alpha: float = 0.0,
        inner: str = "sgd",
        inner_options: dict[str, Any] | None = None,
        train_rest: bool = False,
        rest_lr: float = 1e-3,
        eps: float = 1e-7,
    ) -> None:
        if weight_decay:
            raise BadInput("Layca keeps the norm of every layer, so weight_decay means nothing with it: leave it at 0")
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})
        if any(group["weight_decay"] for group in self.param_groups):
            raise BadInput("Layca keeps the norm of every layer, so weight_decay means nothing with it: leave it at 0")
        self.eps = eps
        kernels = [p for g in self.param_groups for p in g["params"] if p.dim() >= 2]
        rest = [p for g in self.param_groups for p in g["params"] if p.dim() < 2]
        self._profile = dict(zip(kernels, rotation_profile(alpha, len(kernels)), strict=True))
        # The kernels' proposals are taken at step size 1: their length is replaced anyway.
        groups: list[dict[str, Any]] = [{"params": kernels, "lr": 1.0}]
        if train_rest and rest:
            groups.append({"params": rest, "lr": rest_lr})
        self.inner: torch.optim.Optimizer = lookup(INNER, inner, "inner optimizer")(groups, lr=1.0, **(inner_options or {}))
        self.state = self.inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every layer that has a gradient."""
        loss = closure() if closure is not None else None
        moved = [
            (p, g["lr"] * self._profile[p]) for g in self.param_groups for p in g["params"] if p in self._profile and p.grad is not None
        ]
        before = [p.clone() for p, _ in moved]
        # From zero, the inner step is the proposal itself: no cancellation against weights far larger than it.
        for parameter, _ in moved:
            parameter.zero_()
        self.inner.step()
        for (parameter, rho), weight in zip(moved, before, strict=True):
            parameter.copy_(_turn(weight, -parameter, rho, self.eps))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.inner.state = self.state


def _turn(weight: Tensor, step: Tensor, rho: float, eps: float) -> Tensor:
    """`weight` turned against `step` by arctan(rho), at the same norm."""
    norm = weight.norm()
    step = step - (step * weight).sum() / norm.square().clamp(min=torch.finfo(weight.dtype).tiny) * weight
    length = step.norm()
    step = torch.where(length > eps, step * (norm / length.clamp(min=eps)), torch.zeros_like(step))
    turned = weight - rho * step
    return turned * (norm / turned.norm().clamp(min=torch.finfo(weight.dtype).tiny))
