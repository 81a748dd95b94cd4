"""Images cut into patches, with class, distillation and register tokens: the input of vision transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.embed.spec import PatchSpec
from layerwise.errors import BadInput
from layerwise.nn.norms import fill_norm, make_norm


class PatchEmbedding(nn.Module):
    """[class, distillation, registers, patches] + positions, normalized and dropped out as the spec says.

    `pixel_values` (b, c, h, w) -> (b, prefix + rows * columns, width). Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words",
    section 3.1; positions for other sizes are interpolated as in its section 3.2, bicubically as in DINO's published code.
    """

    def __init__(self, spec: PatchSpec, width: int) -> None:
        super().__init__()
        assert spec.channels is not None, "the number of channels is filled in before a model is built"
        self.spec, self.width = spec, width
        rows, columns = spec.grid
        self.project = nn.Conv2d(spec.channels, width, spec.patch, stride=spec.patch, bias=spec.bias)
        self.class_token = _vectors(width) if spec.class_token else None
        self.distill_token = _vectors(width) if spec.distill_token else None
        self.registers = _vectors(spec.registers, width) if spec.registers else None
        self.mask_token = _vectors(width) if spec.mask_token else None
        self.positions = _vectors(spec.placed + rows * columns, width) if spec.position == "learned" else None
        self.norm = make_norm(spec.norm, width, spec.norm_eps) if spec.norm else None
        self.dropout = nn.Dropout(spec.dropout)

    def grid(self, pixels: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """(rows, columns) of patches of these images; what does not fill a patch at the right and below is left out."""
        return pixels.shape[-2] // self.spec.patch[0], pixels.shape[-1] // self.spec.patch[1]

    def forward(self, batch: Mapping[str, Any], positions: Tensor | None = None) -> Float[Tensor, "b s width"]:
        """Embed `batch["pixel_values"]`; `batch["bool_masked_pos"]` (b, rows * columns), True: hidden, if it is there.

        Raises:
            BadInput: the images have other channels, are smaller than a patch, or are to be masked by a model without a mask token.
        """
        pixels = batch["pixel_values"].to(self.project.weight.dtype)
        spec = self.spec
        if pixels.shape[1] != spec.channels or min(self.grid(pixels)) < 1:
            raise BadInput(
                f"images are (batch, {spec.channels}, at least {spec.patch[0]}, at least {spec.patch[1]}); got {tuple(pixels.shape)}"
            )
        if spec.mean != 0.0 or spec.std != 1.0:
            pixels = (pixels - spec.mean) / spec.std
        x = self.project(pixels).flatten(2).transpose(1, 2)
        hidden = batch.get("bool_masked_pos")
        if hidden is not None:
            if self.mask_token is None:
                raise BadInput("bool_masked_pos hides patches behind a mask token, and this model has none (embedding.mask_token)")
            x = torch.where(hidden.bool()[..., None], self.mask_token, x)
        front = [token.expand(len(x), 1, -1) for token in (self.class_token, self.distill_token) if token is not None]
        x = torch.cat([*front, x], dim=1)
        if self.positions is not None:
            x = x + self.positions_for(self.grid(pixels))
        if self.registers is not None:
            x = torch.cat([x[:, : spec.placed], self.registers.expand(len(x), -1, -1), x[:, spec.placed :]], dim=1)
        return self.dropout(x if self.norm is None else self.norm(x))

    def positions_for(self, grid: tuple[int, int]) -> Float[Tensor, "n width"]:
        """The position vectors of the placed tokens and of a grid of patches; half precision is interpolated in float32."""
        assert self.positions is not None
        if grid == self.spec.grid:
            return self.positions
        front, patches = self.positions.split([self.spec.placed, len(self.positions) - self.spec.placed])
        table = patches.unflatten(0, self.spec.grid).permute(2, 0, 1)[None]
        wide = table.to(torch.promote_types(table.dtype, torch.float32))
        resized = F.interpolate(wide, size=grid, mode="bicubic", align_corners=False, antialias=self.spec.antialias)
        return torch.cat([front, resized[0].flatten(1).T.to(table.dtype)])

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """Normal vectors and map, as the stack's weights; a zero mask token."""
        for parameter in (self.project.weight, self.class_token, self.distill_token, self.registers, self.positions):
            if parameter is not None:
                nn.init.normal_(parameter, std=std, generator=generator)
        for zero in (self.project.bias, self.mask_token):
            if zero is not None:
                nn.init.zeros_(zero)
        if self.norm is not None:
            fill_norm(self.norm, 1.0)


def _vectors(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))
