"""Synthesized sound, to look at a model with: it needs no file."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.data.load import Split
from layerwise.embed.audio_spec import MelSpec, WaveSpec
from layerwise.embed.mel import log_mel

RATE = 16000


@dataclass
class Sounds:
    """Splits of sound."""

    train: Split
    validation: Split


def tones(rows: int, samples: int = RATE, seed: int = 0, rate: int = RATE) -> Float[Tensor, "rows samples"]:
    """Voices of a kind: ten harmonics of a gliding pitch of 100 to 300 Hz, a swelling loudness and some noise, with unit variance."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / rate
    start, end, swell = (torch.rand(rows, 1, generator=generator) for _ in range(3))
    pitch = 100 + 200 * (start + (end - start) * time / time[-1].clamp(min=1 / rate))
    phase = 2 * math.pi * pitch.cumsum(dim=1) / rate
    voice = torch.stack([torch.sin(k * phase) / k for k in range(1, 11)]).sum(dim=0)
    voice = voice * (1 + torch.sin(2 * math.pi * (2 + 4 * swell) * time)) + 0.05 * torch.randn(rows, samples, generator=generator)
    return (voice - voice.mean(dim=1, keepdim=True)) / voice.std(dim=1, keepdim=True)


def glide(rows: int, seed: int = 0) -> Int[Tensor, " rows"]:
    """Where the pitch of each of `tones(rows, seed=seed)` goes: down (0), hardly anywhere (1), up (2)."""
    generator = torch.Generator().manual_seed(seed)
    start, end, _ = (torch.rand(rows, 1, generator=generator) for _ in range(3))
    way = (end - start)[:, 0]
    return (way > -0.2).long() + (way > 0.2).long()


def sounds_for(spec: WaveSpec | MelSpec, rows: int) -> Sounds:
    """One second of sound a row, as a model's embedding wants it: waveforms, or log-mel spectrograms of at most its length."""

    def split(seed: int) -> Split:
        if isinstance(spec, WaveSpec):
            return Split({"waves": np.asarray(tones(rows, max(RATE, spec.least), seed))})
        return Split({"mels": np.asarray(log_mel(0.1 * tones(rows, RATE, seed), mels=spec.mels)[..., : 2 * spec.max_length])})

    return Sounds(split(0), split(1))
