"""Encoded pictures to one array of bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from layerwise.errors import BadInput
from layerwise.memory import check_room


def decoded(values: Iterable[Any], name: str) -> np.ndarray:
    """Pictures as one (n, c, h, w) uint8 array: one channel where all are grey, three where any is coloured.

    Args:
        values: `{"bytes": ..., "path": ...}`, one a picture, as `datasets` stores them.
        name: of the source, for messages.

    Raises:
        BadInput: a picture cannot be decoded, they are of different sizes, or would not fit this machine.
    """
    from PIL import Image

    arrays: list[np.ndarray] = []
    pixels = 0
    for value in values:
        try:
            with warnings.catch_warnings():
                # What PIL only warns of is a small file that would become a very large picture.
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]) as image:
                    pixels += image.width * image.height
                    check_room(6 * pixels, f"{name}: decoding its first {len(arrays) + 1} images")  # three channels, stacked once
                    arrays.append(_bytes(image))
        except BadInput:
            raise
        except Exception as error:  # PIL's decoders raise whatever their formats do
            raise BadInput(f"{name}: image {len(arrays)} cannot be decoded: {error}") from error
    if not arrays:
        raise BadInput(f"{name} has a split without any image")
    sizes = sorted({(a.shape[1], a.shape[0]) for a in arrays})
    if len(sizes) > 1:
        (w, h), (v, g) = sizes[:2]
        raise BadInput(f"{name}: images have {len(sizes)} different sizes ({w}x{h}, {v}x{g}, ...); resize them to one first")
    if len({a.ndim for a in arrays}) > 1:
        arrays = [a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a in arrays]
    stacked = np.stack(arrays)
    return stacked[:, None] if stacked.ndim == 3 else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))


def _bytes(image: Any) -> np.ndarray:
    """(h, w) of a grey picture, (h, w, 3) of a coloured one."""
    if image.mode.startswith("I"):
        # 16 bits a pixel; PIL's own conversion would cut everything above 255 off.
        return (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
    return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB"))
