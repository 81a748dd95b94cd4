"""Raw waveforms made into frames by convolutions: the input of wav2vec 2.0 and HuBERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.embed.audio_spec import WaveSpec
from layerwise.errors import BadInput
from layerwise.nn.ffn import activation
from layerwise.nn.gradient import scale_gradient
from layerwise.nn.norms import fill_norm, make_norm


class WaveEmbedding(nn.Module):
    """`input_values` (b, samples) -> (b, frames, width): convolve, normalize, project, hide, add positions, normalize.

    Sources: Baevski et al. 2020, "wav2vec 2.0", section 2; Hsu et al. 2021, "HuBERT", section II; the published code's order of things.
    """

    def __init__(self, spec: WaveSpec, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self.convolutions = nn.ModuleList(ExtractorLayer(spec, i, inner) for i, inner in enumerate((1, *spec.channels[:-1])))
        self.project_norm = nn.LayerNorm(spec.channels[-1], eps=spec.norm_eps) if spec.project_norm else None
        self.project = nn.Linear(spec.channels[-1], width)
        self.feature_dropout = nn.Dropout(spec.feature_dropout)
        self.mask_vector = nn.Parameter(torch.empty(width)) if spec.mask_vector else None
        self.positions = PositionConvolution(width, spec.position_kernel, spec.position_groups)
        self.norm = make_norm(spec.norm, width, spec.norm_eps) if spec.norm else None
        self.dropout = nn.Dropout(spec.dropout)

    def frame_mask(self, batch: Mapping[str, Any]) -> Bool[Tensor, "b frames"] | None:
        """Which frames are real, from `attention_mask` (b, samples) (1 = real, padding on the right); None when all are."""
        mask = batch.get("attention_mask")
        if mask is None:
            return None
        lengths = mask.long().sum(dim=1)
        for kernel, stride in zip(self.spec.kernels, self.spec.strides, strict=True):
            lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
        return torch.arange(self.spec.frames(mask.shape[1]), device=mask.device) < lengths[:, None]

    def features(self, waves: Float[Tensor, "b samples"]) -> Float[Tensor, "b frames channels"]:
        """What the convolutions make of waveforms.

        Raises:
            BadInput: they are not (batch, samples), or too short for a frame.
        """
        if waves.dim() != 2 or waves.shape[1] < self.spec.least:
            raise BadInput(f"input_values are (batch, at least {self.spec.least} samples); got {tuple(waves.shape)}")
        x = waves[:, None].to(self.project.weight.dtype)
        for convolution in self.convolutions:
            x = convolution(x)
        return x.transpose(1, 2)

    def forward(self, batch: Mapping[str, Any], mask: Tensor | None = None) -> Float[Tensor, "b frames width"]:
        """Embed `batch["input_values"]`; frames where `batch["mask_time_indices"]` (b, frames) is True are hidden, if it is there.

        Args:
            mask: `frame_mask(batch)`; padding is zeroed before positions are told, so that it says nothing to its neighbours.

        Raises:
            BadInput: waveforms that give no frame, or frames to be hidden by a model without a mask vector.
        """
        x = scale_gradient(self.features(batch["input_values"]), self.spec.feature_gradient)
        x = self.feature_dropout(self.project(x if self.project_norm is None else self.project_norm(x)))
        hidden = batch.get("mask_time_indices")
        if hidden is not None:
            if self.mask_vector is None:
                raise BadInput("mask_time_indices hides frames behind a mask vector, and this model has none (embedding.mask_vector)")
            x = torch.where(hidden.bool()[..., None], self.mask_vector, x)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        act = activation(self.spec.activation)
        x = x + act(self.positions(x.transpose(1, 2))).transpose(1, 2)
        return self.dropout(x if self.norm is None else self.norm(x))

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """He et al.'s normal filters, a uniform mask vector, and a projection like the stack's weights."""
        for convolution in self.convolutions:
            convolution.initialize(generator)  # type: ignore[operator]
        nn.init.normal_(self.project.weight, std=std, generator=generator)
        nn.init.zeros_(self.project.bias)
        if self.mask_vector is not None:
            nn.init.uniform_(self.mask_vector, generator=generator)
        self.positions.initialize(generator)
        for norm in (self.project_norm, self.norm):
            if norm is not None:
                fill_norm(norm, 1.0)


class ExtractorLayer(nn.Module):
    """A convolution over time, its norm if it has one, and the activation: (b, c, n) -> (b, c', n')."""

    def __init__(self, spec: WaveSpec, index: int, inner: int) -> None:
        super().__init__()
        outer = spec.channels[index]
        self.activation, self.over_time = spec.activation, spec.extractor_norm == "group"
        self.convolution = nn.Conv1d(inner, outer, spec.kernels[index], stride=spec.strides[index], bias=spec.bias)
        self.norm: nn.GroupNorm | nn.LayerNorm | None = None
        if not self.over_time:
            self.norm = nn.LayerNorm(outer)
        elif index == 0:
            self.norm = nn.GroupNorm(outer, outer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        if self.norm is not None:
            x = self.norm(x) if self.over_time else self.norm(x.transpose(1, 2)).transpose(1, 2)
        return activation(self.activation)(x)

    def initialize(self, generator: torch.Generator) -> None:
        nn.init.kaiming_normal_(self.convolution.weight, generator=generator)
        if self.convolution.bias is not None:
            nn.init.zeros_(self.convolution.bias)
        if self.norm is not None:
            fill_norm(self.norm, 1.0)


class PositionConvolution(nn.Module):
    """A grouped convolution over frames, (b, c, n) -> (b, c, n), whose filters are gain * direction / |direction|, one gain a tap.

    With an even kernel the last of the n + 1 outputs is dropped. Source: Salimans and Kingma 2016, "Weight Normalization", equation 2;
    Baevski et al. 2020, section 2.
    """

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        if width % groups:
            raise BadInput(f"embedding.position_groups ({groups}) must divide the stack's width ({width})")
        self.kernel, self.groups = kernel, groups
        self.gain = nn.Parameter(torch.empty(1, 1, kernel))
        self.direction = nn.Parameter(torch.empty(width, width // groups, kernel))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "b c n"]) -> Float[Tensor, "b c n"]:
        length = torch.linalg.vector_norm(self.direction, dim=(0, 1), keepdim=True)
        out = F.conv1d(x, self.direction * (self.gain / length), self.bias, padding=self.kernel // 2, groups=self.groups)
        return out[..., : x.shape[-1]]

    def initialize(self, generator: torch.Generator) -> None:
        """Filters of standard deviation 2 / sqrt(kernel * width), the gain their length; no bias."""
        nn.init.normal_(self.direction, std=2 * (self.kernel * self.direction.shape[0]) ** -0.5, generator=generator)
        with torch.no_grad():
            self.gain.copy_(torch.linalg.vector_norm(self.direction, dim=(0, 1), keepdim=True))
        nn.init.zeros_(self.bias)
