"""Small convolutional networks drawn at random: what a graph hypernetwork is trained on."""

from __future__ import annotations

from collections.abc import Collection

import torch

from layerwise.embed.spec import PixelSpec
from layerwise.models.plain_spec import PlainLayerSpec, PlainStackSpec
from layerwise.models.spec import HeadSpec, ModelSpec

WIDTHS, KERNELS = (8, 12, 16, 20, 24, 28, 32), (1, 3, 5)
SMALLEST = 4
"""Rows of the maps below which nothing is pooled any more."""


def sample_architecture(
    generator: torch.Generator,
    *,
    channels: int,
    size: tuple[int, int],
    classes: int,
    depths: tuple[int, int] = (3, 6),
    widths: tuple[int, ...] = WIDTHS,
    kernels: tuple[int, ...] = KERNELS,
) -> ModelSpec:
    """A classifier of images: convolutions of random widths and kernels, some pairs of them around an identity (residual sums), with
    batch norm or biases, some followed by pooling.

    Images of more than 16 rows are halved by the first convolution's stride and again by pooling after it; half of the networks have batch norm throughout, a
    quarter in random layers, a quarter not at all.

    Args:
        depths: fewest and most convolutions (a residual layer has two, and a third where its channels change).
    """

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    convolutions = depths[0] + below(depths[1] - depths[0] + 1)
    normed = (1.0, 1.0, 0.5, 0.0)[below(4)]
    layers: list[PlainLayerSpec] = []
    rows, used = min(size), 0
    while used < convolutions:
        norm = "batch" if torch.rand(1, generator=generator) < normed else "none"
        residual = bool(layers) and used + 2 <= convolutions and below(3) == 0
        width = layers[-1].channels if residual and below(2) else widths[below(len(widths))]
        stride = 2 if not layers and rows > 16 else 1
        rows //= stride
        pool = rows >= 2 * SMALLEST and (stride == 2 or below(2) == 0) and used + 1 < convolutions
        rows //= 1 + pool
        kind = "residual" if residual else "conv"
        kernel = kernels[below(len(kernels))] if layers else kernels[-1 - below(2)]
        layers.append(
            PlainLayerSpec(kind=kind, channels=width, size=kernel, stride=stride, pool=pool, norm=norm, bias=norm == "none")  # type: ignore[arg-type]
        )
        used += 2 if residual else 1
    return ModelSpec(
        embedding=PixelSpec(channels=channels, size=size),
        stack=PlainStackSpec(layers=tuple(layers), inputs=channels),
        head=HeadSpec(kind="classifier", classes=classes, bias=True),
    )


def distinct(count: int, generator: torch.Generator, *, but: Collection[ModelSpec] = (), **options: object) -> list[ModelSpec]:
    """`count` different architectures, none of them one of `but`."""
    found: dict[ModelSpec, None] = {}
    while len(found) < count:
        spec = sample_architecture(generator, **options)  # type: ignore[arg-type]
        if spec not in but:
            found[spec] = None
    return list(found)
