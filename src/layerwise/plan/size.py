"""Bytes of a model's weights on disk, from its description alone."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from layerwise.models.model import make_model
from layerwise.models.spec import ModelSpec
from layerwise.stack.layer import make_layer
from layerwise.stack.spec import LayerSpec


def model_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of all tensors that a checkpoint of this model holds, none of which is made.

    What is a parameter has the model's `dtype`; buffers (packed codes, their scales) have their own.
    """
    with torch.device("meta"):
        return _bytes(make_model(spec), dtype)


class LayerBytes:
    """The same for single layers of a model; equal layers are counted once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._known: dict[str, int] = {}

    def __call__(self, layer: LayerSpec) -> int:
        key = layer_key(layer)
        if key not in self._known:
            with torch.device("meta"):
                self._known[key] = _bytes(make_layer(layer), self.dtype)
        return self._known[key]


def layer_key(layer: LayerSpec) -> str:
    """The same text for layers that are described alike."""
    return json.dumps(dataclasses.asdict(layer), sort_keys=True)


def _bytes(module: Any, dtype: torch.dtype) -> int:
    """Of every tensor in the module's state once, whatever number of names it has."""
    parameters = sum(p.numel() for p in module.parameters()) * dtype.itemsize
    kept = module.state_dict(keep_vars=True)
    buffers = {id(b): b for name, b in module.named_buffers() if name in kept}
    return parameters + sum(b.numel() * b.element_size() for b in buffers.values())
