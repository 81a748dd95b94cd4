"""CLIP's image tower: a ViT with a norm before its layers, and one on the class token alone after them, which is perhaps projected."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import PatchSpec
from layerwise.models.hf.clip_text_model import LAYERS, read_layers, write_layers
from layerwise.models.hf.family import Family, Rule, names, one_of, pair_of, patches_of
from layerwise.models.spec import HeadSpec, ModelSpec


def read_vision(config: dict[str, Any], size: int | None) -> ModelSpec:
    """Their config to our description; `size` is that of the projection, None without one."""
    eps = config.get("layer_norm_eps", 1e-5)
    head = HeadSpec(kind="projection", size=size, pool="first", pool_norm="layernorm", norm_eps=eps) if size is not None else None
    return ModelSpec(
        embedding=PatchSpec(
            channels=config.get("num_channels", 3),
            size=pair_of(config.get("image_size", 224)),
            patch=pair_of(config.get("patch_size", 32)),
            bias=False,
            norm="layernorm",
            norm_eps=eps,
        ),
        stack=read_layers(config, 768, 12, 3072, final_norm=False),
        head=head,
    )


def write_vision(spec: ModelSpec) -> dict[str, Any]:
    """Our description to their config."""
    patches = patches_of(spec)
    return {
        **write_layers(spec),
        "num_channels": patches.channels,
        "image_size": one_of(patches.size or (1, 1)),
        "patch_size": one_of(patches.patch),
    }


def vision_rules(ours: str = "") -> tuple[Rule, ...]:
    """The names of the tower and its projection."""
    inside = "vision_model.embeddings."
    return (
        *names({"class_token": "class_embedding", "positions": "position_embedding.weight"}, f"{ours}embedding.", inside),
        Rule((f"{ours}embedding.project",), f"{inside}patch_embedding"),
        Rule((f"{ours}embedding.norm",), "vision_model.pre_layrnorm"),
        *names(LAYERS, f"{ours}stack.layers.*.", "vision_model.encoder.layers.*."),
        Rule((f"{ours}head.norm",), "vision_model.post_layernorm"),
        Rule((f"{ours}head.out",), "visual_projection"),
    )


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    return read_vision(config, config.get("projection_dim", 512) if head else None)


FAMILY = Family(
    "clip_vision_model",
    _read,
    write_vision,
    vision_rules(),
    base=("CLIPVisionModel",),
    classifier=("CLIPVisionModelWithProjection",),
    prefix="vision_model.",
    reads=PatchSpec,
    ignored=("embeddings.position_ids",),
    carried=("vision_model.post_layernorm.",),
)
