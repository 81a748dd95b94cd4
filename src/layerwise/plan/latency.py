"""Milliseconds of every kind of layer, measured on the machine that asks."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from layerwise.errors import BadInput
from layerwise.evaluate.batches import inference
from layerwise.models.model import build
from layerwise.models.spec import ModelSpec
from layerwise.nn.cache import Cache
from layerwise.plan.size import layer_key
from layerwise.stack.spec import LayerSpec

LAYERS, REPEATS, SECONDS = 4, 5, 0.1
"""A layer is measured in a stack of so many alike, so often at least and so long at least."""


@dataclass(frozen=True)
class Work:
    """What is timed: `prefill`, one pass over `batch` texts of `length` tokens, or `decode`, one more token of each of them, with
    the keys and values of `length` tokens at hand."""

    phase: Literal["decode", "prefill"] = "decode"
    batch: int = 1
    length: int = 128

    def __post_init__(self) -> None:
        if self.phase not in ("decode", "prefill"):
            raise BadInput(f"latency is that of decode or prefill; got '{self.phase}'")
        if self.batch < 1 or self.length < 1:
            raise BadInput(f"latency is measured on at least one text of at least one token; got {self.batch} of {self.length}")


def milliseconds(model: Any, work: Work) -> float:
    """The least time that the work took, in several tries: what it takes where nothing else runs. Logits of the last position, or the vector of a text where
    there is no head, included.

    Where one thread of a CPU does the work, its own time is counted, which other processes do not lengthen by taking turns.
    """
    device = model.device
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    ids = torch.zeros(work.batch, work.length, dtype=torch.long, device=device)
    best, tries, started = float("inf"), 0, time.perf_counter()
    with inference(model):
        cache = Cache() if work.phase == "decode" else None
        if cache is not None:
            model({"input_ids": ids}, cache=cache)
        while tries < REPEATS or time.perf_counter() - started < SECONDS:
            if cache is not None:
                cache.crop(work.length)
            _wait(device)
            before = clock()
            out = model({"input_ids": ids if cache is None else ids[:, :1]}, cache=cache)
            if out.model.head is None:
                _ = out.pooled
            else:
                out.hidden = out.hidden[:, -1:]
                _ = out.logits
            _wait(device)
            best, tries = min(best, clock() - before), tries + (best < float("inf"))
    return 1000 * best


class LayerLatency:
    """Milliseconds of layers of a model, by their description; equal ones are measured once.

    Attributes:
        outside: what the model takes without any layer.
    """

    def __init__(self, spec: ModelSpec, work: Work, dtype: torch.dtype, device: str = "cpu") -> None:
        self.spec, self.work, self.dtype, self.device = spec, work, dtype, device
        self._known: dict[str, float] = {}
        self.outside = self._measured([])

    def __call__(self, layer: LayerSpec) -> float:
        key = layer_key(layer)
        if key not in self._known:
            self._known[key] = max(self._measured([layer] * LAYERS) - self.outside, 0.0) / LAYERS
        return self._known[key]

    def _measured(self, layers: list[LayerSpec]) -> float:
        stack: Any = self.spec.stack
        model = build(dataclasses.replace(self.spec, stack=stack.with_layers(layers)), device=self.device)
        for parameter in model.parameters():  # buffers keep the types they are stored in
            parameter.data = parameter.data.to(self.dtype)
        return milliseconds(model, self.work)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
