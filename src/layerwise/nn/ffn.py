"""The feed-forward sub-layer, gated or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.nn.linear import make_linear
from layerwise.nn.norms import make_norm
from layerwise.stack.spec import LayerSpec


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The pointwise function of an activation's name; for gated ones, what the gate goes through."""
    functions: dict[str, Callable[..., Tensor]] = {"gelu": F.gelu, "geglu": F.gelu, "relu": F.relu, "silu": F.silu, "swiglu": F.silu}
    if name == "quick_gelu":  # Hendrycks and Gimpel 2016, "GELUs", section 2: the sigmoid approximation
        return lambda x: x * torch.sigmoid(1.702 * x)
    return (lambda x: F.gelu(x, approximate="tanh")) if name in ("gelu_tanh", "geglu_tanh") else functions[name]


class FeedForward(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) when gated. Source of the gated form: Shazeer 2020, "GLU Variants".

    With `spec.ffn_norm`, a norm over what `down` multiplies (Shleifer et al. 2021, "NormFormer", section 2).
    """

    reads = ("up", "gate")
    writes = ("down",)

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        width, inner = spec.width, spec.ffn_width
        assert width and inner
        self.activation = spec.ffn
        self.gate = make_linear("gate", width, inner, spec.ffn_bias, spec) if spec.gated else None
        self.up = make_linear("up", width, inner, spec.ffn_bias, spec)
        self.norm = make_norm(spec.norm, inner, spec.norm_eps, spec.norm_bias) if spec.ffn_norm else None
        self.down = make_linear("down", inner, width, spec.ffn_bias, spec)

    def forward(self, x: Float[Tensor, "*b width"]) -> Float[Tensor, "*b width"]:
        act = activation(self.activation)
        inner = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(inner if self.norm is None else self.norm(inner))
