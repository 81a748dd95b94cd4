"""One residual branch of a layer, and where its norms stand.

| placement  | y =                    |
|------------|------------------------|
| `pre`, `lns` | x + F(N(x))          |
| `post`     | N(x + F(x))            |
| `deepnorm` | N(alpha x + F(x))      |
| `sandwich` | x + N_out(F(N(x)))     |

With `layer_scale` F's output is multiplied by a trained gain, one number a dimension, on its way into the stream (Touvron et al.
2021, "Going deeper with Image Transformers", section 2).

NormFormer's post-attention norm N_out stands on one branch only, in any placement but sandwich: x + N_out(F(N(x))), N(x + N_out(F(x))).
Its residual gain multiplies the stream x beside the feed-forward. A stream gate is applied to y, or to x beside F(x) in `post` and
`deepnorm`.

`lns` (LayerNorm scaling) is `pre` whose gains start at 1/sqrt(layer index + 1). Sources: Vaswani et al. 2017 (post);
Xiong et al. 2020 (pre); Wang et al. 2022, "DeepNet" (deepnorm); Ding et al. 2021, "CogView" (sandwich);
Sun et al. 2025, "The Curse of Depth" (lns); Shleifer et al. 2021, "NormFormer", section 2; for the gate see `layerwise.nn.gates`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.nn.norms import Gain, fill_norm, is_norm, make_norm
from layerwise.nn.positions import GridBias
from layerwise.stack.spec import LayerSpec


class Residual(nn.Module):
    """A branch (attention, feed-forward, ...) with its norms and its way back into the residual stream.

    Attributes:
        branch: the module F; it lists the names of its linears that read the stream (`reads`) and write it (`writes`).

    Args:
        norm_out: a norm on the branch's output, whatever the placement. gain: learned factors on the stream beside the branch.
    """

    def __init__(self, branch: Any, spec: LayerSpec, norm_out: bool = False, gain: bool = False) -> None:
        super().__init__()
        assert spec.width and spec.residual_scale is not None and spec.norm_gain is not None
        self.placement, self.alpha, self.gain = spec.placement, spec.residual_scale, spec.norm_gain
        self.branch: Any = branch
        self.norm = make_norm(spec.norm, spec.width, spec.norm_eps, spec.norm_bias)
        out = norm_out or spec.placement == "sandwich"
        self.norm_out = make_norm(spec.norm, spec.width, spec.norm_eps, spec.norm_bias) if out else None
        self.residual = Gain(spec.width) if gain else None
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()
        self.initial_scale = spec.layer_scale
        self.scale = nn.Parameter(torch.empty(spec.width)) if spec.layer_scale is not None else None

    def forward(self, x: Float[Tensor, "*b width"], *args: Any, gate: nn.Module | None = None) -> Float[Tensor, "*b width"]:
        stream = x if self.residual is None else self.residual(x)
        if self.placement not in ("post", "deepnorm"):
            stream = stream + self.change(x, *args)
            return stream if gate is None else gate(stream)
        if gate is not None:
            stream = gate(stream)
        return self.norm((stream if self.alpha == 1.0 else self.alpha * stream) + self._written(self.branch(x, *args)))

    def change(self, x: Float[Tensor, "*b width"], *args: Any) -> Float[Tensor, "*b width"]:
        """What a branch with its norm in front adds to the stream."""
        return self._written(self.branch(self.norm(x), *args))

    def _written(self, out: Tensor) -> Tensor:
        out = self.dropout(out if self.norm_out is None else self.norm_out(out))
        return out if self.scale is None else out * self.scale

    def initialize(self, std: float, write_std: float, depth: int, generator: torch.Generator) -> None:
        """Norms to their gain; linears normal, or Xavier with DeepNorm's gain (8 depth)^(-1/4) on value, output and feed-forward."""
        fill_norm(self.norm, self.gain)
        if self.norm_out is not None:
            fill_norm(self.norm_out, self.gain if self.placement == "sandwich" else 1.0)
        if self.residual is not None:
            fill_norm(self.residual, 1.0)
        if self.scale is not None and self.initial_scale is not None:
            nn.init.constant_(self.scale, self.initial_scale)
        for name, linear in self.branch.named_children():
            if name in self.branch.writes or name in self.branch.reads:
                scale = write_std if name in self.branch.writes else std
                if self.placement == "deepnorm":
                    gain = 1.0 if name in ("q", "k") else (8 * depth) ** -0.25
                    scale = gain * (2 / (linear.in_features + linear.out_features)) ** 0.5
                linear.initialize(scale, generator)
            elif is_norm(linear):
                fill_norm(linear, 1.0)
            elif hasattr(linear, "initialize"):
                linear.initialize(std, generator)
            elif isinstance(linear, GridBias):
                nn.init.normal_(linear.weight, std=std, generator=generator)
