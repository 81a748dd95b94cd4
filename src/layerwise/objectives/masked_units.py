"""Predicting what is hidden in a recording: the number of the cluster that each hidden frame's spectrum belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.embed.audio_spec import WaveSpec
from layerwise.embed.mel import mel_filters
from layerwise.errors import BadInput
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective

TEMPERATURE = 0.1
BANDS, COEFFICIENTS, FITTED_ON = 24, 13, 20_000


class MaskedUnits(Objective):
    """Cross-entropy of the units of hidden frames: -log softmax(cos(A h_t, e_u) / 0.1), u the nearest of k-means' centres of MFCCs.

    The centres are found once, in training data, when the stage begins. Spans of frames are hidden behind the model's mask vector.
    Metric: `accuracy` of the hidden frames' units.

    Source: Hsu et al. 2021, "HuBERT" (arXiv 2106.07447), its first iteration, with the loss on hidden frames alone.

    Args:
        units: number of clusters. start: probability that a span begins at a frame. span: frames of one.
    """

    centres: Tensor

    def __init__(self, data: Any = None, *, units: int = 50, start: float = 0.08, span: int = 5) -> None:
        super().__init__()
        if units < 2 or span < 1 or not 0 < start < 1:
            raise BadInput(f"units is at least 2, span at least 1 and start a probability; got {units}, {span} and {start}")
        if getattr(data, "kind", "sound") != "sound":
            raise BadInput("masked-units reads recordings; this data has none")
        self.data, self.units, self.start, self.span = data, units, start, span
        self.project: nn.Linear | None = None
        self.code: nn.Parameter | None = None

    def attach(self, model: Any, batch: Mapping[str, Any]) -> None:
        spec, width = model.spec.embedding, model.spec.stack.width
        if not isinstance(spec, WaveSpec) or not spec.mask_vector:
            raise BadInput(
                "masked-units needs a model that reads waveforms and has a mask vector (embedding: {kind: wave, mask_vector: true})"
            )
        generator = torch.Generator().manual_seed(0)
        self.project = nn.Linear(width, width)
        for parameter in self.project.parameters():
            nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
        self.code = nn.Parameter(torch.rand(self.units, width, generator=generator))
        self.register_buffer("centres", self._fitted(spec), persistent=False)
        self.to(model.device)

    def _fitted(self, spec: WaveSpec) -> Float[Tensor, "units coefficients"]:
        from sklearn.cluster import MiniBatchKMeans

        rows = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(0))[:512].sort().values
        seen = []
        for part in rows.split(64):
            batch = self.data.train.batch(part)
            frames = mfcc(batch["input_values"], spec, self.data.rate)
            seen.append(frames[frame_mask(batch, spec, frames.shape[1])])
        found = MiniBatchKMeans(self.units, n_init=3, batch_size=2048, random_state=0).fit(torch.cat(seen)[:FITTED_ON].numpy())
        return torch.from_numpy(found.cluster_centers_).float()

    def forward(self, model: Any, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        if self.project is None:
            self.attach(model, batch)
        assert self.project is not None and self.code is not None
        spec = model.spec.embedding
        frames = mfcc(batch["input_values"], spec, self.data.rate)
        real = frame_mask(batch, spec, frames.shape[1])
        units = torch.cdist(frames, self.centres).argmin(dim=-1)
        hidden = spans(real, self.start, self.span, generator)
        out = model({**batch, "mask_time_indices": hidden}, **context)
        states = F.normalize(self.project(out.hidden[hidden]), dim=-1)
        scores = states @ F.normalize(self.code, dim=-1).T / TEMPERATURE
        wanted = units[hidden]
        total = F.cross_entropy(scores, wanted, reduction="sum")
        return Loss(total, hidden.sum(), {"accuracy": (scores.argmax(dim=-1) == wanted).sum()})


def spans(real: Bool[Tensor, "b t"], start: float, span: int, generator: torch.Generator | None = None) -> Bool[Tensor, "b t"]:
    """Which frames are hidden: `span` from each of some starts on, real ones only, and at least one span in each row."""
    drawn = torch.rand(real.shape, generator=generator, device=real.device)
    lengths = real.sum(dim=1, keepdim=True)
    place = torch.arange(real.shape[1], device=real.device)
    fits = place <= (lengths - span).clamp(min=0)
    begins = (drawn < start) & fits
    first = drawn.masked_fill(~fits, 2.0).argmin(dim=1, keepdim=True)
    begins = begins.scatter(1, first, True)
    windows = F.max_pool1d(F.pad(begins.float(), (span - 1, 0))[:, None], span, stride=1)[:, 0]
    return (windows > 0) & real


def frame_mask(batch: Mapping[str, Any], spec: WaveSpec, frames: int) -> Bool[Tensor, "b t"]:
    """Which of a batch's frames are real."""
    waves, mask = batch["input_values"], batch.get("attention_mask")
    if mask is None:
        return torch.ones(len(waves), frames, dtype=torch.bool, device=waves.device)
    lengths = torch.tensor([spec.frames(int(n)) for n in mask.sum(dim=1)], device=waves.device)
    return torch.arange(frames, device=waves.device) < lengths[:, None]


def mfcc(waves: Float[Tensor, "b samples"], spec: WaveSpec, rate: int) -> Float[Tensor, "b t coefficients"]:
    """Mel-frequency cepstral coefficients, without the first (loudness), of what each frame of the model's convolutions sees.

    The cosine transform of the log energy in mel bands; frames lie where the convolutions put them.
    """
    stride = 1
    for step in spec.strides:
        stride *= step
    pieces = waves.unfold(1, spec.least, stride)
    window = torch.hann_window(spec.least, device=waves.device, dtype=waves.dtype)
    power = torch.fft.rfft(pieces * window).abs().square()
    bands = (power @ mel_filters(BANDS, power.shape[-1], rate, top=rate / 2).to(power).T).clamp(min=1e-8).log()
    place = torch.arange(BANDS, device=waves.device, dtype=waves.dtype) + 0.5
    order = torch.arange(1, COEFFICIENTS, device=waves.device, dtype=waves.dtype)
    return bands @ torch.cos(torch.pi / BANDS * place[:, None] * order) * (2 / BANDS) ** 0.5
