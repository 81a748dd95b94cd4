"""Starting points for a model section: plain data, merged under whatever a job says."""

from __future__ import annotations

import copy
from typing import Any

from layerwise.table import unknown

_LLAMA_LAYER = {"causal": True, "position": "rotary", "ffn": "swiglu", "norm": "rmsnorm", "placement": "pre"}
_BERT_LAYER = {
    "ffn": "gelu",
    "norm": "layernorm",
    "norm_eps": 1e-12,
    "placement": "post",
    "qkv_bias": True,
    "out_bias": True,
    "ffn_bias": True,
}
_VIT_LAYER = {"ffn": "gelu", "norm": "layernorm", "placement": "pre", "qkv_bias": True, "out_bias": True, "ffn_bias": True}
_T5_LAYER = {"ffn": "relu", "norm": "rmsnorm", "position": "relative", "placement": "pre"}


def _convs(*channels: int | tuple[int, int], kind: str = "conv") -> list[dict[str, Any]]:
    """Layers of so many channels; a pair (channels, 0) pools after the layer, (channels, 2) strides by two."""
    made = []
    for c in channels:
        width, step = c if isinstance(c, tuple) else (c, 1)
        made.append({"kind": kind, "channels": width, "pool": step == 0, "stride": max(step, 1)})
    return made


PRESETS: dict[str, dict[str, Any]] = {
    # A Llama-style decoder: exports as a Llama checkpoint.
    "decoder": {"stack": {"depth": 8, "width": 256, "layer": {**_LLAMA_LAYER, "heads": 4}}, "head": {"kind": "lm"}},
    # BERT: learned positions, post-norm, tied vocabulary with a transform.
    "bert": {
        "embedding": {"position": "learned", "types": 2, "norm": "layernorm", "norm_eps": 1e-12},
        "stack": {"depth": 4, "width": 256, "final_norm": False, "layer": {**_BERT_LAYER, "heads": 4}},
        "head": {"kind": "lm", "tie": True, "bias": True, "transform": "gelu"},
    },
    # A pre-norm encoder with rotary positions.
    "encoder": {
        "stack": {"depth": 6, "width": 256, "layer": {**_LLAMA_LAYER, "causal": False, "heads": 4}},
        "head": {"kind": "lm", "tie": True, "bias": True, "transform": "gelu"},
    },
    # T5-style: relative positions, cross-attention.
    "encoder-decoder": {
        "stack": {"depth": 4, "width": 256, "layer": {**_T5_LAYER, "heads": 4}},
        "decoder": {"depth": 4, "width": 256, "layer": {**_T5_LAYER, "heads": 4, "causal": True, "cross": True}},
        "head": {"kind": "lm", "tie": True},
    },
    # ViT: patches and a class token, pre-norm; exports as a ViT checkpoint.
    "vit": {
        "embedding": {"kind": "patches", "patch": [4, 4]},
        "stack": {"depth": 6, "width": 128, "layer": {**_VIT_LAYER, "heads": 4}},
        "head": {"kind": "classifier", "pool": "first", "bias": True},
    },
    # Fully connected, as in the MNIST study of layer rotation: one hidden layer, batch norm.
    "mlp": {
        "embedding": {"kind": "pixels", "flatten": True},
        "stack": {"layers": [{"kind": "dense", "channels": 784, "norm": "batch"}]},
        "head": {"kind": "classifier", "bias": True},
    },
    "vgg": {
        "embedding": {"kind": "pixels"},
        "stack": {"layers": _convs(32, (32, 0), 64, (64, 0), 128, 128)},
        "head": {"kind": "classifier", "bias": True},
    },
    "resnet": {
        "embedding": {"kind": "pixels"},
        "stack": {"layers": [*_convs(16), *_convs(16, 16, (32, 2), 32, (64, 2), 64, kind="residual")]},
        "head": {"kind": "classifier", "bias": True},
    },
}


def preset(name: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A copy of a preset's data, with `changes` laid over it: mappings key by key at every depth, everything else replaced."""
    if name not in PRESETS:
        raise unknown(name, PRESETS, "preset")
    return _over(copy.deepcopy(PRESETS[name]), changes or {})


def _over(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return copy.deepcopy(new)
    return {**old, **{key: _over(old.get(key), value) for key, value in new.items()}}
