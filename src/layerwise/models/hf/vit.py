"""ViT: pre-norm layers over patches and a class token, which a classifier reads.

Its relatives start from what is here.
"""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import PatchSpec
from layerwise.models.hf.family import (
    Family,
    Rule,
    classes_of,
    names,
    one_of,
    pair_of,
    patches_of,
    read_activation,
    stack_of,
    write_activation,
)
from layerwise.models.hf.layouts import CORNER, ROW
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

ATTENTION = {
    "mixer.branch.q": "attention.attention.query",
    "mixer.branch.k": "attention.attention.key",
    "mixer.branch.v": "attention.attention.value",
    "mixer.branch.o": "attention.output.dense",
}
LAYERS = {
    **ATTENTION,
    "mixer.norm": "layernorm_before",
    "ffn.branch.up": "intermediate.dense",
    "ffn.branch.down": "output.dense",
    "ffn.norm": "layernorm_after",
}


def image_rules(prefix: str, layers: dict[str, str], mask_layout: Any = CORNER) -> tuple[Rule, ...]:
    """The names of everything but the head, for the families that are built like ViT; a rule without a tensor of ours is not used."""
    inside = f"{prefix}embeddings."
    return (
        *names({"class_token": "cls_token", "distill_token": "distillation_token"}, "embedding.", inside, CORNER),
        Rule(("embedding.mask_token",), f"{inside}mask_token", mask_layout),
        *names({"positions": "position_embeddings", "registers": "register_tokens"}, "embedding.", inside, ROW),
        Rule(("embedding.project",), f"{inside}patch_embeddings.projection"),
        *names(layers, "stack.layers.*.", f"{prefix}encoder.layer.*."),
        Rule(("stack.norm",), f"{prefix}layernorm"),
    )


CLASSIFIER = Rule(("head.out",), "classifier")


def read_image(
    config: dict[str, Any], head: HeadSpec | None, *, embedding: dict[str, Any], layer: dict[str, Any], eps: float = 1e-12, patch: int = 16,
    final_norm: bool = True,
) -> ModelSpec:  # fmt: skip
    """Their config to our description; `embedding` and `layer` hold what the member of the family has otherwise, `eps` and `patch` its defaults."""
    eps = config.get("layer_norm_eps", eps)
    dropout = config.get("hidden_dropout_prob", 0.0)
    fields: dict[str, Any] = {
        "channels": config.get("num_channels", 3),
        "size": pair_of(config.get("image_size", 224)),
        "patch": pair_of(config.get("patch_size", patch)),
        "dropout": dropout,
    }
    inner: dict[str, Any] = {
        "heads": config["num_attention_heads"],
        "ffn": read_activation(config, "hidden_act", "gelu"),
        "qkv_bias": bool(config.get("qkv_bias", True)),
        "out_bias": True,
        "ffn_bias": True,
        "norm": "layernorm",
        "norm_eps": eps,
        "placement": "pre",
        "dropout": dropout,
        "attention_dropout": config.get("attention_probs_dropout_prob", 0.0),
    }
    return ModelSpec(
        embedding=PatchSpec(**fields | embedding),
        stack=StackSpec(
            depth=config["num_hidden_layers"],
            width=config["hidden_size"],
            layer=LayerSpec(**inner | layer),
            final_norm=final_norm,
            init_std=config.get("initializer_range", 0.02),
        ),
        head=head,
    )


def write_image(spec: ModelSpec) -> dict[str, Any]:
    """Our description to the config keys that the whole family has."""
    stack, patches = stack_of(spec), patches_of(spec)
    layer = stack.layers[0]
    labels = {} if spec.head is None else {"num_labels": spec.head.classes}
    return {
        "hidden_size": stack.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": layer.heads,
        "hidden_act": write_activation(layer.ffn),
        "hidden_dropout_prob": patches.dropout,
        "attention_probs_dropout_prob": layer.attention_dropout,
        "initializer_range": stack.init_std,
        "layer_norm_eps": layer.norm_eps,
        "image_size": one_of(patches.size or (1, 1)),
        "patch_size": one_of(patches.patch),
        "num_channels": patches.channels,
        **labels,
    }


def masked(config: dict[str, Any], architecture: str) -> bool:
    """Whether a config is of a model that learns from hidden patches, the only ones with a mask token."""
    return (config.get("architectures") or [None])[0] == architecture


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    return read_image(
        config,
        HeadSpec(kind="classifier", classes=classes_of(config), pool="first", bias=True) if head else None,
        embedding={"mask_token": masked(config, "ViTForMaskedImageModeling")},
        layer={"ffn_width": config["intermediate_size"]},
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    layer = stack_of(spec).layers[0]
    named = {"architectures": ["ViTForMaskedImageModeling"]} if patches_of(spec).mask_token and spec.head is None else {}
    return {**write_image(spec), "intermediate_size": layer.ffn_width, "qkv_bias": layer.qkv_bias, **named}


FAMILY = Family(
    "vit",
    _read,
    _write,
    (*image_rules("vit.", LAYERS), CLASSIFIER),
    base=("ViTModel", "ViTForMaskedImageModeling"),
    classifier=("ViTForImageClassification",),
    prefix="vit.",
    reads=PatchSpec,
    carried=("vit.pooler.", "decoder."),
)
