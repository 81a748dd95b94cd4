"""Bottleneck layers: three convolutions around an identity, with norms after them or before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.models.plain import PlainLayer, fill_plain, plain_norm
from layerwise.models.plain_spec import PlainLayerSpec
from layerwise.nn.convolution import Convolution


class Bottleneck(nn.Module):
    """ReLU(norm conv ReLU norm conv ReLU norm conv x + shortcut): (b, c, h, w) -> (b, c', h', w'). The middle convolution is wide, 1x1 the others.

    Kind `preactivation` has norm and ReLU before each convolution, and the projecting shortcut reads their first output. Sources: He et
    al. 2016, "Deep Residual Learning", figure 5; He et al. 2016, "Identity Mappings in Deep Residual Networks", section 4.
    """

    def __init__(self, spec: PlainLayerSpec) -> None:
        super().__init__()
        assert spec.inner, "the number of input channels is filled in before a model is built"
        self.spec = spec
        self.before = spec.kind == "preactivation"
        widths = (spec.inner, spec.narrow, spec.narrow, spec.channels)
        first = spec.stride_first
        strides = (spec.stride if first else 1, 1 if first else spec.stride, 1)
        kinds: dict[str, Any] = {"bias": spec.bias, "standardize": spec.standardize, "same": spec.padding == "same"}
        self.convolutions = nn.ModuleList(
            Convolution(
                widths[i], widths[i + 1], spec.size if i == 1 else 1, stride=strides[i], dilation=spec.dilation if i == 1 else 1, **kinds
            )
            for i in range(3)
        )
        self.norms = nn.ModuleList(plain_norm(spec, w) for w in (widths[:3] if self.before else widths[1:]))
        self.shortcut = self.shortcut_norm = None
        if spec.projected:
            self.shortcut = Convolution(spec.inner, spec.channels, 1, stride=spec.stride, **kinds | {"bias": False})
            self.shortcut_norm = None if self.before else plain_norm(spec)
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()

    def forward(self, x: Tensor, ctx: Any = None, slot: Any = None) -> Tensor:
        out = self._before(x) if self.before else self._after(x)
        return self.dropout(F.max_pool2d(out, 2) if self.spec.pool else out)

    def _after(self, x: Tensor) -> Tensor:
        bypass = x if self.shortcut is None or self.shortcut_norm is None else self.shortcut_norm(self.shortcut(x))
        out = x
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            out = norm(convolution(out))
            out = F.relu(out + bypass if i == 2 else out)
        return out

    def _before(self, x: Tensor) -> Tensor:
        out = F.relu(self.norms[0](x))
        bypass = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.norms[1](self.convolutions[0](out)))
        out = F.relu(self.norms[2](self.convolutions[1](out)))
        return self.convolutions[2](out) + bypass

    def initialize(self, std: float, write_std: float, depth: int, generator: torch.Generator) -> None:
        """As `PlainLayer.initialize`."""
        fill_plain(self, generator)


def make_plain(spec: PlainLayerSpec) -> nn.Module:
    """The module of a plain layer, by its kind."""
    return Bottleneck(spec) if spec.bottleneck else PlainLayer(spec)
