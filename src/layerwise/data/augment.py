"""Random changes to training images, on whatever device they are."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from layerwise.data.spec import AugmentSpec

Batch = dict[str, Tensor]


def make_augment(spec: AugmentSpec, size: tuple[int, int]) -> Callable[[Batch], Batch]:
    """The augmentation of a spec for images of a size: changes `pixel_values` (b, c, h, w) in [0, 1]."""
    import kornia.augmentation as K

    steps: list[nn.Module] = []
    if spec.crop:
        steps.append(K.RandomCrop(size, padding=spec.crop))
    if spec.flip:
        steps.append(K.RandomHorizontalFlip(p=0.5))
    if spec.rotate:
        steps.append(K.RandomRotation(spec.rotate, p=1.0))
    if spec.color:
        steps.append(K.ColorJitter(spec.color, spec.color, spec.color, p=1.0))
    change = nn.Sequential(*steps)

    def augment(batch: Batch) -> Batch:
        return {**batch, "pixel_values": change(batch["pixel_values"]).clamp(0, 1)}

    return augment
