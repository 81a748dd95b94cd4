"""One-bit weights and activations with straight-through gradients.

Sources: Rastegari et al. 2016, "XNOR-Net", section 3.1 (weights); Liu et al. 2022, "BiT", section 3.2 (elastic activations);
as Xing et al. 2024, "BiPFT" (arXiv 2312.08937) use them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FLOOR = 1e-5
"""Scales are at least this."""


def sign(x: Tensor) -> Tensor:
    """+1 for zero too: a bit has two values."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def binary_weight(weight: Tensor, rows: bool = False) -> Tensor:
    """mean|W| sign(W - mean W); the gradient passes to W unchanged.

    Args:
        rows: a scale for every row (the word embedding); the mean that is subtracted stays one.
    """
    return _Weight.apply(weight, rows)


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: bool) -> Tensor:
        scale = weight.abs().mean(dim=1, keepdim=True) if rows else weight.abs().mean()
        return scale * sign(weight - weight.mean())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Elastic(nn.Module):
    """Activations as one bit with a learned scale: alpha sign(x), or alpha clamp(round(x / alpha), 0, 1) for what is never negative.

    The scale is set on the first batch, to 2 mean|x| (4 mean|x| unsigned), and remembers that it was.

    Args:
        signed: two values -alpha and alpha, or 0 and alpha.
    """

    ready: Tensor

    def __init__(self, signed: bool = True) -> None:
        super().__init__()
        self.signed = signed
        self.alpha = nn.Parameter(torch.empty(()))
        self.register_buffer("ready", torch.empty((), dtype=torch.bool))
        self._known = False

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """No scale yet: the first batch gives it."""
        nn.init.ones_(self.alpha)
        self.ready.fill_(False)
        self._known = False

    def forward(self, x: Tensor) -> Tensor:
        if not self._known:  # asked once: reading a tensor's value waits for the device
            if not self.ready:
                with torch.no_grad():
                    self.alpha.copy_(((2 if self.signed else 4) * x.abs().mean()).clamp(min=FLOOR))
                    self.ready.fill_(True)
            self._known = True
        return (_Signed if self.signed else _Unsigned).apply(x, self.alpha)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known = False


class _Signed(torch.autograd.Function):
    """alpha sign(x). dx = g where |x| <= alpha; dalpha = sum(g sign x) / sqrt(numel)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        alpha = alpha.clamp(min=FLOOR).to(x.dtype)
        ctx.save_for_backward(x, alpha)
        return alpha * sign(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (g,) = gradients
        x, alpha = ctx.saved_tensors
        return g * (x.abs() <= alpha), (g * sign(x)).sum() / x.numel() ** 0.5


class _Unsigned(torch.autograd.Function):
    """alpha clamp(round(x / alpha), 0, 1). dx = g where 0 <= x <= alpha; dalpha as in learned step sizes, over sqrt(numel)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        alpha = alpha.clamp(min=FLOOR).to(x.dtype)
        ctx.save_for_backward(x, alpha)
        return alpha * (x / alpha).round().clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (g,) = gradients
        x, alpha = ctx.saved_tensors
        q = x / alpha
        inside = (q >= 0) & (q <= 1)
        return g * inside, (g * ((q > 1) + inside * (q.round() - q))).sum() / x.numel() ** 0.5
