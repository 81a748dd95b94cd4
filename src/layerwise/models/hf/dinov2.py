"""DINOv2: ViT with layer scale, perhaps a SwiGLU feed-forward; a classifier reads the class token and the mean patch."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import PatchSpec
from layerwise.errors import BadInput
from layerwise.models.hf.family import Family, Rule, classes_of, patches_of, stack_of, stages
from layerwise.models.hf.layouts import ROW
from layerwise.models.hf.vit import ATTENTION, CLASSIFIER, image_rules, read_image, write_image
from layerwise.models.spec import HeadSpec, ModelSpec

LAYERS = {
    **ATTENTION,
    "mixer.norm": "norm1",
    "mixer.scale": "layer_scale1.lambda1",
    "ffn.norm": "norm2",
    "ffn.scale": "layer_scale2.lambda1",
}


def _gated_width(inner: int) -> int:
    """A SwiGLU feed-forward keeps two thirds of the plain one's width, rounded up to a multiple of 8."""
    return (int(inner * 2 / 3) + 7) // 8 * 8


def read_dinov2(config: dict[str, Any], head: bool, **embedding: Any) -> ModelSpec:
    """Their config to our description; `embedding` holds what the member of the family has otherwise."""
    inner = int(config["hidden_size"] * config.get("mlp_ratio", 4))
    gated = bool(config.get("use_swiglu_ffn", False))
    layer: dict[str, Any] = {
        "ffn_width": _gated_width(inner) if gated else inner,
        "layer_scale": float(config.get("layerscale_value", 1.0)),
        "drop": config.get("drop_path_rate", 0.0),
        "dropout": 0.0,
    }
    return read_image(
        config,
        HeadSpec(kind="classifier", classes=classes_of(config), pool="first_and_patches", bias=True) if head else None,
        embedding=embedding,
        layer=layer | ({"ffn": "swiglu"} if gated else {}),
        eps=1e-6,
        patch=14,
    )


def write_dinov2(spec: ModelSpec) -> dict[str, Any]:
    """Our description to the config keys that both members of the family have."""
    stack = stack_of(spec)
    layer = stack.layers[0]
    assert layer.ffn_width
    ratios = range(1, 1 + 2 * (layer.ffn_width // stack.width + 1))
    fits = [r for r in ratios if (_gated_width(r * stack.width) if layer.gated else r * stack.width) == layer.ffn_width]
    if not fits:
        raise BadInput(f"its feed-forward of width {layer.ffn_width} is no whole multiple of the stream's {stack.width}")
    return {
        **write_image(spec),
        "mlp_ratio": fits[0],
        "qkv_bias": layer.qkv_bias,
        "use_swiglu_ffn": layer.gated,
        "layerscale_value": 1.0 if layer.layer_scale is None else layer.layer_scale,
        "drop_path_rate": layer.drop,
        **stages(stack.depth),
    }


def dinov2_rules(prefix: str) -> tuple[Rule, ...]:
    """The names of the family."""
    inner, mlp = "stack.layers.*.ffn.branch.", f"{prefix}encoder.layer.*.mlp."
    return (
        *image_rules(prefix, LAYERS, ROW),
        Rule((f"{inner}gate", f"{inner}up"), f"{mlp}weights_in", when=_gated),
        *(Rule((f"{inner}down",), f"{mlp}weights_out", when=_gated),),
        *(Rule((f"{inner}{ours}",), mlp + theirs, when=_ungated) for ours, theirs in (("up", "fc1"), ("down", "fc2"))),
        CLASSIFIER,
    )


def _gated(spec: ModelSpec) -> bool:
    return any(layer.gated for layer in stack_of(spec).layers)


def _ungated(spec: ModelSpec) -> bool:
    return not _gated(spec)


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    return read_dinov2(config, head, mask_token=bool(config.get("use_mask_token", True)))


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {**write_dinov2(spec), "use_mask_token": patches_of(spec).mask_token}


FAMILY = Family(
    "dinov2",
    _read,
    _write,
    dinov2_rules("dinov2."),
    base=("Dinov2Model",),
    classifier=("Dinov2ForImageClassification",),
    prefix="dinov2.",
    reads=PatchSpec,
)
