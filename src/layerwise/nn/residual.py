"""One residual branch of a layer, and where its norms stand.

| placement  | y =                    |
|------------|------------------------|
| `pre`, `lns` | x + F(N(x))          |
| `post`     | N(x + F(x))            |
| `deepnorm` | N(alpha x + F(x))      |
| `sandwich` | x + N_out(F(N(x)))     |

With `layer_scale` F's output is multiplied by a trained gain, one number a dimension, on its way into the stream (Touvron et al.
2021, "Going deeper with Image Transformers", section 2).

`lns` (LayerNorm scaling) is `pre` whose gains start at 1/sqrt(layer index + 1). Sources: Vaswani et al. 2017 (post);
Xiong et al. 2020 (pre); Wang et al. 2022, "DeepNet" (deepnorm); Ding et al. 2021, "CogView" (sandwich);
Sun et al. 2025, "The Curse of Depth" (lns).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.nn.norms import fill_norm, make_norm
from layerwise.nn.positions import GridBias
from layerwise.stack.spec import LayerSpec


class Residual(nn.Module):
    """A branch (attention, feed-forward, ...) with its norms and its way back into the residual stream.

    Attributes:
        branch: the module F; it lists the names of its linears that read the stream (`reads`) and write it (`writes`).
    """

    def __init__(self, branch: Any, spec: LayerSpec) -> None:
        super().__init__()
        assert spec.width and spec.residual_scale is not None and spec.norm_gain is not None
        self.placement, self.alpha, self.gain = spec.placement, spec.residual_scale, spec.norm_gain
        self.branch: Any = branch
        self.norm = make_norm(spec.norm, spec.width, spec.norm_eps, spec.norm_bias)
        self.norm_out = make_norm(spec.norm, spec.width, spec.norm_eps, spec.norm_bias) if spec.placement == "sandwich" else None
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()
        self.initial_scale = spec.layer_scale
        self.scale = nn.Parameter(torch.empty(spec.width)) if spec.layer_scale is not None else None

    def forward(self, x: Float[Tensor, "*b width"], *args: Any) -> Float[Tensor, "*b width"]:
        if self.placement in ("post", "deepnorm"):
            stream = x if self.alpha == 1.0 else self.alpha * x
            return self.norm(stream + self._scaled(self.dropout(self.branch(x, *args))))
        return x + self.change(x, *args)

    def change(self, x: Float[Tensor, "*b width"], *args: Any) -> Float[Tensor, "*b width"]:
        """What a branch with its norm in front adds to the stream."""
        out = self.branch(self.norm(x), *args)
        return self._scaled(self.dropout(out if self.norm_out is None else self.norm_out(out)))

    def _scaled(self, out: Float[Tensor, "*b width"]) -> Float[Tensor, "*b width"]:
        return out if self.scale is None else out * self.scale

    def initialize(self, std: float, write_std: float, depth: int, generator: torch.Generator) -> None:
        """Norms to their gain; linears normal, or Xavier with DeepNorm's gain (8 depth)^(-1/4) on value, output and feed-forward."""
        for norm in (self.norm, self.norm_out):
            if norm is not None:
                fill_norm(norm, self.gain)
        if self.scale is not None and self.initial_scale is not None:
            nn.init.constant_(self.scale, self.initial_scale)
        for name, linear in self.branch.named_children():
            if name in self.branch.writes or name in self.branch.reads:
                scale = write_std if name in self.branch.writes else std
                if self.placement == "deepnorm":
                    gain = 1.0 if name in ("q", "k") else (8 * depth) ** -0.25
                    scale = gain * (2 / sum(linear.weight.shape)) ** 0.5
                linear.initialize(scale, generator)
            elif isinstance(linear, nn.RMSNorm):
                fill_norm(linear, 1.0)
            elif isinstance(linear, GridBias):
                nn.init.normal_(linear.weight, std=std, generator=generator)
