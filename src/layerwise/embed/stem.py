"""The first convolution of a ResNet and what follows it before the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.embed.spec import StemSpec
from layerwise.errors import BadInput
from layerwise.nn.convolution import Convolution, pad_same


class StemEmbedding(nn.Module):
    """Convolution, norm with ReLU, max pooling: `pixel_values` (b, c, h, w) -> (b, width, h', w').

    Sources: He et al. 2016, "Deep Residual Learning", table 1; Kolesnikov et al. 2020, "Big Transfer", whose published code
    pads with zeros before the pooling.
    """

    def __init__(self, spec: StemSpec, width: int = 0) -> None:
        super().__init__()
        assert spec.channels is not None, "the number of channels is filled in before a model is built"
        self.spec = spec
        same = spec.padding == "same"
        self.convolution = Convolution(spec.channels, spec.width, spec.kernel, stride=spec.stride, standardize=spec.standardize, same=same)
        self.norm: nn.BatchNorm2d | nn.GroupNorm | None = None
        if spec.norm != "none":
            self.norm = nn.BatchNorm2d(spec.width) if spec.norm == "batch" else nn.GroupNorm(spec.groups, spec.width)

    def forward(self, batch: Mapping[str, Any], positions: Tensor | None = None) -> Float[Tensor, "b width h w"]:
        """Raises BadInput when the images have other channels."""
        x = batch["pixel_values"].to(self.convolution.weight.dtype)
        if x.shape[1] != self.spec.channels:
            raise BadInput(f"images are (batch, {self.spec.channels}, height, width); got {tuple(x.shape)}")
        if self.spec.mean != 0.0 or self.spec.std != 1.0:
            x = (x - self.spec.mean) / self.spec.std
        x = self.convolution(x)
        pool = self.spec.pool
        if pool == "zero":
            x = F.pad(x, (1, 1, 1, 1))
        if self.norm is not None:
            x = F.relu(self.norm(x))
        if pool == "none":
            return x
        x = pad_same(x, 3, 2) if pool == "same" else x
        return F.max_pool2d(x, 3, 2, padding=1 if pool == "max" else 0)

    def initialize(self, std: float | None, generator: torch.Generator) -> None:
        """He-normal filters (fan in, ReLU), norms at gain 1."""
        nn.init.kaiming_normal_(self.convolution.weight, nonlinearity="relu", generator=generator)
        if self.norm is not None:
            nn.init.ones_(self.norm.weight)
            nn.init.zeros_(self.norm.bias)
            if isinstance(self.norm, nn.BatchNorm2d):
                self.norm.reset_running_stats()
