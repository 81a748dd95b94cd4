"""Log-mel spectrograms, and the convolutions that read them: the input of Whisper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.embed.audio_spec import MelSpec
from layerwise.errors import BadInput


class MelEmbedding(nn.Module):
    """`input_features` (b, mels, 2 n) -> (b, n, width): two convolutions with GELU, the second halving the rate, plus positions.

    Positions are sinusoids that no training moves; a checkpoint keeps them as a table. Source: Radford et al. 2023, "Robust Speech
    Recognition via Large-Scale Weak Supervision", section 2.2.
    """

    positions: Tensor

    def __init__(self, spec: MelSpec, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self.first = nn.Conv1d(spec.mels, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.register_buffer("positions", torch.empty(spec.max_length, width))
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, batch: Mapping[str, Any]) -> Float[Tensor, "b n width"]:
        """Embed `batch["input_features"]`; shorter ones than Whisper's 30 seconds are fine.

        Raises:
            BadInput: another number of bands, or more frames than there are positions for.
        """
        mels = batch["input_features"]
        if mels.dim() != 3 or mels.shape[1] != self.spec.mels or not 1 <= mels.shape[2] <= 2 * self.spec.max_length:
            raise BadInput(f"input_features are (batch, {self.spec.mels}, 1 to {2 * self.spec.max_length}); got {tuple(mels.shape)}")
        x = F.gelu(self.first(mels.to(self.first.weight.dtype)))
        x = F.gelu(self.second(x)).transpose(1, 2)
        return self.dropout(x + self.positions[: x.shape[1]])

    def initialize(self, std: float, generator: torch.Generator) -> None:
        for convolution in (self.first, self.second):
            nn.init.normal_(convolution.weight, std=std, generator=generator)
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
        with torch.no_grad():
            self.positions.copy_(whisper_positions(self.spec.max_length, self.width, self.positions.device))


def whisper_positions(length: int, width: int, device: torch.device | None = None) -> Float[Tensor, "length width"]:
    """Sinusoids whose wavelengths reach from 2 pi to 10000 * 2 pi, both ends included; an odd width ends in 0."""
    half = width // 2
    frequency = torch.exp(-math.log(10000.0) / max(half - 1, 1) * torch.arange(half, device=device, dtype=torch.float32))
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def mel_filters(mels: int, bins: int, rate: int, top: float = 8000.0) -> Float[Tensor, "mels bins"]:
    """Triangular filters, evenly spaced on Slaney's scale from 0 Hz to `top`, each of unit area.

    Slaney's scale is linear below 1,000 Hz (200 / 3 Hz a mel) and logarithmic above (a factor of 6.4 in 27 mels). Source: Slaney 1998,
    "Auditory Toolbox", as librosa and Whisper use it.
    """
    step, start, rate_above = 200.0 / 3, 1000.0, math.log(6.4) / 27
    linear = start / step

    def hertz(mel: Tensor) -> Tensor:
        return torch.where(mel < linear, mel * step, start * torch.exp((mel - linear) * rate_above))

    highest = linear + math.log(top / start) / rate_above if top > start else top / step
    edges = hertz(torch.linspace(0, highest, mels + 2, dtype=torch.float64))
    places = torch.linspace(0, rate / 2, bins, dtype=torch.float64)
    slopes = edges[:, None] - places
    rising, falling = -slopes[:-2] / edges.diff()[:-1, None], slopes[2:] / edges.diff()[1:, None]
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).float()


def log_mel(
    waves: Float[Tensor, "b samples"], *, mels: int = 80, rate: int = 16000, window: int = 400, hop: int = 160
) -> Float[Tensor, "b mels frames"]:
    """Whisper's log-mel spectrogram: log10 of the power in each band, at most 8 below the loudest, shifted and scaled to about [-1, 1].

    Args:
        waves: sound in [-1, 1], `rate` samples a second; samples / hop frames come out. (Whisper itself pads to 30 seconds first.)
    """
    hann = torch.hann_window(window, device=waves.device, dtype=waves.dtype)
    power = torch.stft(waves, window, hop, window=hann, return_complex=True)[..., :-1].abs() ** 2
    bands = mel_filters(mels, window // 2 + 1, rate).to(waves) @ power
    levels = bands.clamp(min=1e-10).log10()
    return (torch.maximum(levels, levels.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0
