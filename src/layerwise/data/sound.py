"""Recordings to arrays of samples."""

from __future__ import annotations

import io
import wave
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.memory import check_room


def recordings(values: Iterable[Any], name: str) -> tuple[list[np.ndarray], int]:
    """Recordings as (samples,) int16 arrays, and their sampling rate, which is one for all. Channels are averaged.

    Args:
        values: `{"bytes": ..., "path": ...}`, one a recording, as `datasets` stores them: WAV files of whole numbers (PCM).
        name: of the source, for messages.

    Raises:
        BadInput: one is no such file or empty, rates differ, or all would not fit this machine.
    """
    waves: list[np.ndarray] = []
    rates: set[int] = set()
    total = 0
    for value in values:
        try:
            with wave.open(io.BytesIO(value["bytes"] if value.get("bytes") else Path(value["path"]).read_bytes())) as file:
                rates.add(file.getframerate())
                total += file.getnframes()
                check_room(4 * total, f"{name}: decoding its first {len(waves) + 1} recordings")
                waves.append(_samples(file.readframes(file.getnframes()), file.getsampwidth(), file.getnchannels()))
        except (wave.Error, EOFError, OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{name}: recording {len(waves)} cannot be read as a WAV file (PCM): {error}") from error
        if not len(waves[-1]):
            raise BadInput(f"{name}: recording {len(waves) - 1} has no sample")
    if not waves:
        raise BadInput(f"{name} has a split without any recording")
    if len(rates) > 1:
        raise BadInput(
            f"{name}: recordings have {len(rates)} sampling rates ({', '.join(map(str, sorted(rates)))}); resample them to one first"
        )
    return waves, rates.pop()


def _samples(raw: bytes, size: int, channels: int) -> np.ndarray:
    """Whole numbers of 1 to 4 bytes, little-endian, as int16, one channel."""
    whole = len(raw) // (size * channels) * size * channels
    if size == 1:  # unsigned, alone among them
        wide = (np.frombuffer(raw[:whole], dtype=np.uint8).astype(np.int32) - 128) << 8
    elif size == 3:
        parts = np.frombuffer(raw[:whole], dtype=np.uint8).reshape(-1, 3)
        wide = parts[:, 1].astype(np.int32) | (parts[:, 2].astype(np.int8).astype(np.int32) << 8)  # the low byte is dropped
    else:
        wide = np.frombuffer(raw[:whole], dtype=f"<i{size}").astype(np.int64) >> 8 * (size - 2)
    return np.clip(np.round(wide.reshape(-1, channels).mean(axis=1)), -32768, 32767).astype(np.int16)


def padded_waves(waves: Sequence[np.ndarray], seconds: float | None, rate: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """One (n, samples) int16 array with zeros behind each recording, and their lengths (n,); longer ones than `seconds` are cut."""
    most = max(map(len, waves)) if seconds is None else max(int(seconds * rate), 1)
    check_room(2 * len(waves) * most, f"{name}: {len(waves):,} recordings of {most:,} samples")
    lengths = np.array([min(len(w), most) for w in waves], dtype=np.int64)
    made = np.zeros((len(waves), most), dtype=np.int16)
    for row, recording, length in zip(made, waves, lengths, strict=True):
        row[:length] = recording[:length]
    return made, lengths


def input_values(waves: Int16[Tensor, "b samples"], mask: Int16[Tensor, "b samples"]) -> Float[Tensor, "b samples"]:
    """Samples with mean 0 and variance 1 over the real ones (mask 1) of each recording, and 0 behind them.

    As wav2vec 2.0's feature extractor in `transformers` does it (`do_normalize`, which adds 1e-7 to the variance).
    """
    x, real = waves.float() / 32768, mask.float()
    count = real.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (x * real).sum(dim=1, keepdim=True) / count
    variance = ((x - mean).square() * real).sum(dim=1, keepdim=True) / count
    return (x - mean) / torch.sqrt(variance + 1e-7) * real
