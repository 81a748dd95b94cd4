"""Images handed on as they are, for convolutional and dense stacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.embed.spec import PixelSpec


class PixelEmbedding(nn.Module):
    """(pixels - mean) / std, flattened if asked: `pixel_values` (b, c, h, w) in [0, 1]."""

    def __init__(self, spec: PixelSpec, width: int = 0) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, batch: Mapping[str, Any], positions: Tensor | None = None) -> Tensor:
        x = (batch["pixel_values"] - self.spec.mean) / self.spec.std
        return x.flatten(1) if self.spec.flatten else x

    def initialize(self, std: float | None, generator: torch.Generator) -> None:
        """Nothing to draw."""
