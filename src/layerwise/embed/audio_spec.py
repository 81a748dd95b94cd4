"""How sound becomes vectors: plain data, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerwise.complaint import FORBID
from layerwise.errors import BadInput
from layerwise.stack.spec import Activation, Norm


@dataclass(frozen=True)
class WaveSpec:
    """Raw waveforms through convolutions, a projection and a convolution that tells positions: wav2vec 2.0, HuBERT.

    Attributes:
        channels, kernels, strides: of each convolution over time, bottom first; as many of each.
        bias: the convolutions have biases.
        extractor_norm: `group` normalizes each channel of the first convolution over time, `layer` every frame of all of them.
        activation: after every convolution.
        project_norm: a LayerNorm, with norm_eps, before the frames are projected to the stack's width.
        position_kernel, position_groups: of the grouped convolution over frames whose activated output is added to them.
        mask_vector: a learned vector takes the place of frames hidden by `mask_time_indices`.
        norm: a norm on the sum, with norm_eps; None has none.
        feature_dropout: on the projected frames. dropout: on the result.
        feature_gradient: what the gradient that reaches the convolutions is multiplied by (0.1 as wav2vec 2.0 and HuBERT are trained).
    """

    kind: Literal["wave"] = "wave"
    channels: tuple[int, ...] = (512,) * 7
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    bias: bool = False
    extractor_norm: Literal["group", "layer"] = "group"
    activation: Activation = "gelu"
    project_norm: bool = True
    position_kernel: int = 128
    position_groups: int = 16
    mask_vector: bool = True
    norm: Norm | None = "layernorm"
    norm_eps: float = 1e-5
    feature_dropout: float = 0.0
    dropout: float = 0.0
    feature_gradient: float = 1.0

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.feature_gradient < 0:
            raise BadInput(f"feature_gradient is >= 0; it is {self.feature_gradient}")
        sizes = (self.channels, self.kernels, self.strides)
        if not self.channels or len({len(s) for s in sizes}) > 1 or min(min(s) for s in sizes) < 1:
            raise BadInput(f"channels, kernels and strides give a positive number for each convolution; got {sizes}")
        if self.position_kernel < 1 or self.position_groups < 1 or self.norm_eps < 0:
            raise BadInput(
                f"position_kernel and position_groups are >= 1 and norm_eps >= 0; got {self.position_kernel}, {self.position_groups} "
                f"and {self.norm_eps}"
            )
        if not (0 <= self.dropout < 1 and 0 <= self.feature_dropout < 1):
            raise BadInput(f"dropout is a probability in [0, 1); got {self.dropout} and {self.feature_dropout}")

    def frames(self, samples: int) -> int:
        """How many frames a waveform of that many samples gives; 0 when it is too short."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            samples = (samples - kernel) // stride + 1
        return max(samples, 0)

    @property
    def least(self) -> int:
        """The fewest samples that give a frame."""
        samples = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples


@dataclass(frozen=True)
class MelSpec:
    """Log-mel spectrograms through two convolutions, the second of stride 2, plus fixed sinusoidal positions: Whisper.

    Attributes:
        mels: frequency bands. max_length: frames after the convolutions that there are positions for.
        dropout: on the result.
    """

    kind: Literal["mel"] = "mel"
    mels: int = 80
    max_length: int = 1500
    dropout: float = 0.0

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.mels < 1 or self.max_length < 1 or not 0 <= self.dropout < 1:
            raise BadInput(f"mels and max_length are at least 1 and dropout in [0, 1); got {self.mels}, {self.max_length}, {self.dropout}")
