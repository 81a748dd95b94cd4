"""Images made to fit a model that was trained on others, to look at the model with."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch.nn import functional as F

from layerwise.data.load import Data, Split


def resized(data: Data, *, channels: int, size: tuple[int, int], classes: int | None = None, rows: int) -> Data:
    """The first `rows` images of each split with other channels and another size (bilinear), and labels folded into `classes`."""

    def fit(split: Split) -> Split:
        images = torch.from_numpy(np.array(split.arrays["images"][:rows])).float()
        images = images.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1) if images.shape[1] != channels else images
        arrays = {"images": F.interpolate(images, size=size, mode="bilinear").round().byte().numpy()}
        if "labels" in split.arrays:
            labels = np.asarray(split.arrays["labels"][:rows])
            arrays["labels"] = labels % classes if classes is not None else labels
        return Split(arrays)

    return dataclasses.replace(
        data,
        train=fit(data.train),
        validation=fit(data.validation),
        test=None if data.test is None else fit(data.test),
        channels=channels,
        size=size,
        classes=classes or data.classes,
    )
