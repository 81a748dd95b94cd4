"""BiT: ResNets with standardized filters and group norm, their layers pre-activated or not."""

from __future__ import annotations

import math
from typing import Any

from layerwise.embed.spec import StemSpec
from layerwise.errors import BadInput
from layerwise.models.hf.family import Family, Rule, names, only, stages
from layerwise.models.hf.resnet import depths, placed, plain_of, pooled_classifier, stem_of, whole
from layerwise.models.plain_spec import PlainLayerSpec, PlainStackSpec
from layerwise.models.spec import ModelSpec

EPS = 1e-8
"""Under the root of a filter's deviation; fixed in their code."""
KINDS = {"preactivation": "preactivation", "bottleneck": "bottleneck"}


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and not more than a tenth below."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


def _steps(config: dict[str, Any], count: int) -> list[tuple[int, int]]:
    """(stride, dilation) of each stage: once the maps are as small as `output_stride` says, stages dilate instead of striding."""
    found, reached, dilation = [], 4, 1
    for stage in range(count):
        stride = 2 if stage else 1
        if reached >= config.get("output_stride", 32):
            stride, dilation = 1, dilation * stride
        reached *= stride
        found.append((stride, dilation))
    return found


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    only(config, "hidden_act", ("relu",), "relu")
    only(config, "width_factor", (1,), 1)
    same = only(config, "global_padding", (None, "SAME", "same"), None) is not None
    dynamic = bool(config.get("embedding_dynamic_padding", False))
    if dynamic and not same:
        raise BadInput("config.json: embedding_dynamic_padding pads a second time without global_padding SAME; that is not known here")
    kind: Any = KINDS[only(config, "layer_type", tuple(KINDS), "preactivation")]
    sizes, deep = whole(config)
    odd = [c for c in sizes if c != _rounded(c)]
    if odd:
        raise BadInput(f"config.json: hidden_sizes are multiples of 8; one is {odd[0]}")
    groups, width, before = config.get("num_groups", 32), config.get("embedding_size", 64), kind == "preactivation"
    every: dict[str, Any] = {"kind": kind, "norm": "group", "groups": groups, "standardize": EPS, "padding": "same" if same else "half"}
    layers = []
    for channels, count, (stride, dilation) in zip(sizes, deep, _steps(config, len(sizes)), strict=True):
        first = 1 if dilation in (1, 2) else 2
        for i in range(count):
            # Only layers that are not pre-activated are dilated in their code.
            apart: dict[str, Any] = {"stride": 1 if i else stride, "dilation": 1 if before else dilation if i else first, "project": i == 0}
            layers.append(PlainLayerSpec(channels=channels, middle=_rounded(channels * 0.25), **every, **apart))
    return ModelSpec(
        embedding=StemSpec(
            channels=config.get("num_channels", 3),
            width=width,
            padding="same" if same else "half",
            standardize=EPS,
            norm="none" if before else "group",
            groups=groups,
            pool=("same" if dynamic else "valid") if same else "zero",
        ),
        stack=PlainStackSpec(tuple(layers), inputs=width, final_norm=before),
        head=pooled_classifier(config, head),
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    layers, starts, stem = plain_of(spec).layers, _begins(spec), stem_of(spec)
    firsts = [layer for layer, start in zip(layers, starts, strict=True) if start]
    reached = 4 * math.prod(layer.stride for layer in firsts)
    labels = {} if spec.head is None else {"num_labels": spec.head.classes}
    return {
        "num_channels": stem.channels,
        "embedding_size": stem.width,
        "hidden_sizes": [layer.channels for layer in firsts],
        "depths": depths(starts),
        "layer_type": "preactivation" if layers[0].kind == "preactivation" else "bottleneck",
        "hidden_act": "relu",
        "global_padding": "SAME" if stem.padding == "same" else None,
        "embedding_dynamic_padding": stem.pool == "same",
        "num_groups": layers[0].groups or 32,
        "output_stride": reached if any(layer.stride == 1 for layer in firsts[1:]) else max(32, reached),
        "width_factor": 1,
        **labels,
        **stages(len(firsts)),
    }


def _begins(spec: ModelSpec) -> list[bool]:
    """For each layer, whether a stage begins with it: the first does, and those with a convolution on the way around."""
    return [i == 0 or layer.projected for i, layer in enumerate(plain_of(spec).layers)]


FAMILY = Family(
    "bit",
    _read,
    _write,
    (
        *names({"convolution": "convolution", "norm": "norm"}, "embedding.", "bit.embedder."),
        *names(
            {
                "shortcut": "downsample.conv",
                "shortcut_norm": "downsample.norm",
                **{f"convolutions.{i}": f"conv{i + 1}" for i in range(3)},
                **{f"norms.{i}": f"norm{i + 1}" for i in range(3)},
            },
            "stack.layers.*.",
            "bit.encoder.stages.*.",
        ),
        Rule(("stack.norm.0",), "bit.norm"),
        Rule(("head.out",), "classifier.1"),
    ),
    base=("BitModel",),
    classifier=("BitForImageClassification",),
    prefix="bit.",
    reads=StemSpec,
    stack=PlainStackSpec,
    place=lambda spec: placed(_begins(spec)),
)
