"""Convolutional and dense layers, seen through the same stack as transformer layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.models.plain_spec import PlainLayerSpec, PlainStackSpec


class PlainLayer(nn.Module):
    """A layer of a VGG-like, residual or dense network: (b, c, h, w) -> (b, c', h', w'), or (b, c) -> (b, c')."""

    def __init__(self, spec: PlainLayerSpec) -> None:
        super().__init__()
        assert spec.inner, "the number of input channels is filled in before a model is built"
        self.spec = spec
        if spec.kind == "dense":
            self.weight: nn.Module = nn.Linear(spec.inner, spec.channels, bias=spec.bias)
        else:
            self.weight = _conv(spec, spec.inner, spec.stride)
        self.norm = plain_norm(spec)
        self.second = self.second_norm = self.shortcut = self.shortcut_norm = None
        if spec.kind == "residual":
            self.second, self.second_norm = _conv(spec, spec.channels, 1), plain_norm(spec)
            if spec.projected:
                self.shortcut = nn.Conv2d(spec.inner, spec.channels, 1, stride=spec.stride, bias=False)
                self.shortcut_norm = plain_norm(spec)
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else nn.Identity()

    def forward(self, x: Tensor, ctx: Any = None, slot: Any = None) -> Tensor:
        out = F.relu(self.norm(self.weight(x)))
        if self.second is not None and self.second_norm is not None:
            bypass = x if self.shortcut is None or self.shortcut_norm is None else self.shortcut_norm(self.shortcut(x))
            out = F.relu(self.second_norm(self.second(out)) + bypass)
        return self.dropout(F.max_pool2d(out, 2) if self.spec.pool else out)

    def initialize(self, std: float, write_std: float, depth: int, generator: torch.Generator) -> None:
        """He-normal weights (fan in, ReLU), zero biases, norms at gain 1. Source: He et al. 2015."""
        fill_plain(self, generator)


class PlainNorm(nn.Sequential):
    """Norm and ReLU on the output of a stack, of the kind its last layer has."""

    def __init__(self, spec: PlainStackSpec) -> None:
        super().__init__(plain_norm(spec.layers[-1]), nn.ReLU())

    def initialize(self, generator: torch.Generator) -> None:
        fill_plain(self, generator)


def fill_plain(whole: nn.Module, generator: torch.Generator) -> None:
    """Fresh weights for every convolution, linear map and norm inside, as `PlainLayer.initialize` says."""
    for module in whole.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.reset_running_stats()
            if module.affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def _conv(spec: PlainLayerSpec, inner: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inner, spec.channels, spec.size, stride=stride, padding=spec.size // 2, bias=spec.bias)


def plain_norm(spec: PlainLayerSpec, channels: int | None = None) -> nn.Module:
    """The norm that a layer has, for so many channels (None: those of its output)."""
    channels = spec.channels if channels is None else channels
    if spec.norm == "none":
        return nn.Identity()
    if spec.norm == "group":
        return nn.GroupNorm(spec.groups or channels // spec.group, channels, affine=spec.affine)
    kind = nn.BatchNorm1d if spec.kind == "dense" else nn.BatchNorm2d
    return kind(channels, affine=spec.affine)
