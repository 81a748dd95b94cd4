"""Images turned by quarters and dimmed, with what was done to each: targets that need no label."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.errors import BadInput

LEVELS = (0.4, 0.6, 0.8, 1.0)
"""Brightness an image is multiplied by."""


def turned(
    pixels: Float[Tensor, "b c n n"], generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "b c n n"], Int[Tensor, " b"], Int[Tensor, " b"]]:
    """Each image turned by 0 to 3 quarters and dimmed to one of `LEVELS`: the images, the quarters, the numbers of the levels.

    Raises:
        BadInput: images that are not square, whose quarter turns would have another shape.

    Source of the turns: Gidaris, Singh and Komodakis 2018, "Unsupervised Representation Learning by Predicting Image Rotations".
    """
    if pixels.dim() != 4 or pixels.shape[-1] != pixels.shape[-2]:
        raise BadInput(f"quarter turns need square images (b, c, n, n); got {tuple(pixels.shape)}")
    quarters, levels = (
        torch.randint(0, n, (len(pixels),), generator=generator, device=generator.device if generator is not None else None).to(
            pixels.device
        )
        for n in (4, len(LEVELS))
    )
    every = torch.stack([torch.rot90(pixels, k, (-2, -1)) for k in range(4)])
    chosen = every[quarters, torch.arange(len(pixels), device=pixels.device)]
    return chosen * torch.tensor(LEVELS, device=pixels.device, dtype=pixels.dtype)[levels][:, None, None, None], quarters, levels
