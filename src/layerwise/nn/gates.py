"""A learned factor on the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class StreamGate(nn.Module):
    """x - SiLU(alpha) sg(x), with one number alpha and the stop-gradient sg: gradient-preserving activation scaling.

    Forward it is (1 - SiLU(alpha)) x, which keeps the stream from growing with depth; backward it is the identity for x, so lower
    layers get the gradient they would have had without it. (It is therefore not the gradient of the forward: nothing for
    second derivatives.) alpha starts at 0, where the gate changes nothing, and has the slope SiLU'(0) = 1/2 there.

    A layer has one gate and uses it after each of its branches (placements pre, lns, sandwich), or on the stream beside each
    branch (post, deepnorm), where the branch still reads the stream as it is. A parallel layer uses it once.
    Source: Chen et al. 2025, "GPAS: Accelerating Convergence of LLM Pretraining via Gradient-Preserving Activation Scaling"
    (arXiv 2506.22049), section 3, and its published code.

    Args:
        preserve: stop the gradient of the scaling. Without it, x is simply multiplied (the paper's ablation).
    """

    def __init__(self, preserve: bool = True) -> None:
        super().__init__()
        self.preserve = preserve
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x - (F.silu(self.alpha) * (x.detach() if self.preserve else x)).to(x.dtype)

    def factor(self) -> Tensor:
        """What the forward multiplies by, 1 - SiLU(alpha): at most 1.2785."""
        return 1 - F.silu(self.alpha)
