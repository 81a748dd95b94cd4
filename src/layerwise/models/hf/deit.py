"""DeiT: ViT with a distillation token beside the class token, and a second classifier that may read it."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import PatchSpec
from layerwise.models.hf.family import Family, Rule, classes_of, patches_of, stack_of
from layerwise.models.hf.vit import LAYERS, image_rules, masked, read_image, write_image
from layerwise.models.spec import HeadSpec, ModelSpec

DISTILLED, MASKED = "DeiTForImageClassificationWithTeacher", "DeiTForMaskedImageModeling"


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    pool: Any = "distilled" if DISTILLED in (config.get("architectures") or ()) else "first"
    return read_image(
        config,
        HeadSpec(kind="classifier", classes=classes_of(config), pool=pool, bias=True) if head else None,
        embedding={"distill_token": True, "mask_token": masked(config, MASKED)},
        layer={"ffn_width": config["intermediate_size"]},
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    layer = stack_of(spec).layers[0]
    named = MASKED if patches_of(spec).mask_token and spec.head is None else DISTILLED if _distilled(spec) else None
    kind = {} if named is None else {"architectures": [named]}
    return {**write_image(spec), "intermediate_size": layer.ffn_width, "qkv_bias": layer.qkv_bias, **kind}


def _distilled(spec: ModelSpec) -> bool:
    return spec.head is not None and spec.head.pool == "distilled"


def _plain(spec: ModelSpec) -> bool:
    return not _distilled(spec)


FAMILY = Family(
    "deit",
    _read,
    _write,
    (
        *image_rules("deit.", LAYERS),
        Rule(("head.out",), "classifier", when=_plain),
        Rule(("head.out",), "cls_classifier", when=_distilled),
        Rule(("head.distilled",), "distillation_classifier"),
    ),
    base=("DeiTModel", MASKED),
    classifier=("DeiTForImageClassification", DISTILLED),
    prefix="deit.",
    reads=PatchSpec,
    carried=("deit.pooler.", "decoder."),
)
