"""ResNet: a stem, then stages of basic or bottleneck layers, each stage halving the maps except perhaps the first."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import StemSpec
from layerwise.errors import BadInput
from layerwise.models.hf.family import Family, Rule, classes_of, names, only, stages
from layerwise.models.plain_spec import PlainLayerSpec, PlainStackSpec
from layerwise.models.spec import HeadSpec, ModelSpec

KINDS = {"basic": "residual", "bottleneck": "bottleneck"}
"""Their names of layers -> ours."""


def plain_of(spec: ModelSpec) -> PlainStackSpec:
    """The description's stack, which is known to be of plain layers."""
    assert isinstance(spec.stack, PlainStackSpec)
    return spec.stack


def stem_of(spec: ModelSpec) -> StemSpec:
    """The description's embedding, which is known to be a stem."""
    assert isinstance(spec.embedding, StemSpec)
    return spec.embedding


def pooled_classifier(config: dict[str, Any], head: bool) -> HeadSpec | None:
    """Classes from the mean over space."""
    return HeadSpec(kind="classifier", classes=classes_of(config), pool="mean", bias=True) if head else None


def begins(spec: ModelSpec) -> list[bool]:
    """For each layer, whether a stage begins with it: the first does, and those that halve the maps."""
    return [i == 0 or layer.stride != 1 for i, layer in enumerate(plain_of(spec).layers)]


def placed(starts: list[bool]) -> list[str]:
    """Their place of each layer: `stage.layers.number`."""
    found, stage, number = [], -1, 0
    for start in starts:
        stage, number = (stage + 1, 0) if start else (stage, number + 1)
        found.append(f"{stage}.layers.{number}")
    return found


def depths(starts: list[bool]) -> list[int]:
    """How many layers each stage has."""
    at = [i for i, start in enumerate(starts) if start]
    return [b - a for a, b in zip(at, [*at[1:], len(starts)], strict=True)]


def whole(config: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Channels and depths of the stages, which must be as many and none empty."""
    sizes, deep = list(config.get("hidden_sizes", (256, 512, 1024, 2048))), list(config.get("depths", (3, 4, 6, 3)))
    if len(sizes) != len(deep) or not deep or min(deep) < 1 or sum(deep) > 10_000:
        raise BadInput(f"config.json: hidden_sizes {sizes} and depths {deep} are lists of one number a stage, each depth 1 or more")
    return sizes, deep


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    only(config, "hidden_act", ("relu",), "relu")
    sizes, deep = whole(config)
    kind: Any = KINDS[only(config, "layer_type", tuple(KINDS), "bottleneck")]
    width = config.get("embedding_size", 64)
    first: dict[str, Any] = {"stride_first": bool(config.get("downsample_in_bottleneck", False))} if kind == "bottleneck" else {}
    layers = []
    for stage, (channels, count) in enumerate(zip(sizes, deep, strict=True)):
        stride = 2 if stage or config.get("downsample_in_first_stage", False) else 1
        for i in range(count):
            layers.append(PlainLayerSpec(kind=kind, channels=channels, stride=stride if i == 0 else 1, **first if i == 0 else {}))
    return ModelSpec(
        embedding=StemSpec(channels=config.get("num_channels", 3), width=width),
        stack=PlainStackSpec(tuple(layers), inputs=width),
        head=pooled_classifier(config, head),
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    layers, starts = plain_of(spec).layers, begins(spec)
    firsts = [layer for layer, start in zip(layers, starts, strict=True) if start]
    labels = {} if spec.head is None else {"num_labels": spec.head.classes}
    return {
        "num_channels": stem_of(spec).channels,
        "embedding_size": stem_of(spec).width,
        "hidden_sizes": [layer.channels for layer in firsts],
        "depths": depths(starts),
        "layer_type": "bottleneck" if layers[0].kind == "bottleneck" else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": layers[0].stride == 2,
        "downsample_in_bottleneck": any(layer.stride_first for layer in layers),
        **labels,
        **stages(len(firsts)),
    }


FAMILY = Family(
    "resnet",
    _read,
    _write,
    (
        *names({"convolution": "convolution", "norm": "normalization"}, "embedding.", "resnet.embedder.embedder."),
        *names(
            {
                "weight": "layer.0.convolution",
                "norm": "layer.0.normalization",
                "second": "layer.1.convolution",
                "second_norm": "layer.1.normalization",
                "shortcut": "shortcut.convolution",
                "shortcut_norm": "shortcut.normalization",
                **{f"convolutions.{i}": f"layer.{i}.convolution" for i in range(3)},
                **{f"norms.{i}": f"layer.{i}.normalization" for i in range(3)},
            },
            "stack.layers.*.",
            "resnet.encoder.stages.*.",
        ),
        Rule(("head.out",), "classifier.1"),
    ),
    base=("ResNetModel",),
    classifier=("ResNetForImageClassification",),
    prefix="resnet.",
    reads=StemSpec,
    stack=PlainStackSpec,
    place=lambda spec: placed(begins(spec)),
)
