"""BEiT: ViT with layer scale, keys without a bias, and a learned bias on attention for every offset between patches.

The bias is each layer's own or shared by all. With mean pooling there is no norm on the stream's end; the classifier norms the mean patch.
"""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import PatchSpec
from layerwise.errors import BadInput
from layerwise.models.hf.family import Family, Rule, classes_of, pair_of, patches_of, stack_of, stages
from layerwise.models.hf.vit import CLASSIFIER, LAYERS, image_rules, read_image, write_image
from layerwise.models.spec import HeadSpec, ModelSpec

TABLE = "relative_position_bias.relative_position_bias_table"


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    own, shared = (bool(config.get(key, False)) for key in ("use_relative_position_bias", "use_shared_relative_position_bias"))
    if own and shared:
        raise BadInput("config.json: layers with a position bias of their own and a shared one on top are not known here")
    size, patch = pair_of(config.get("image_size", 224)), pair_of(config.get("patch_size", 16))
    grid = (size[0] // patch[0], size[1] // patch[1])
    if (own or shared) and grid[0] != grid[1]:
        raise BadInput(
            f"config.json: position biases on a grid of {grid[0]} x {grid[1]} patches are mixed up in transformers; only square ones are read"
        )
    scale, mean = config.get("layer_scale_init_value", 0.1), bool(config.get("use_mean_pooling", True))
    layer: dict[str, Any] = {
        "ffn_width": config["intermediate_size"],
        "qkv_bias": True,
        "key_bias": False,
        "layer_scale": scale if scale > 0 else None,
        "position": "grid" if own else "grid_shared" if shared else "none",
        "grid": grid if own or shared else None,
    }
    pooled: dict[str, Any] = {"pool": "patches", "pool_norm": "layernorm"} if mean else {"pool": "first"}
    eps = config.get("layer_norm_eps", 1e-12)
    return read_image(
        config,
        HeadSpec(kind="classifier", classes=classes_of(config), bias=True, norm_eps=eps, **pooled) if head else None,
        embedding={
            "mask_token": bool(config.get("use_mask_token", False)),
            "position": "learned" if config.get("use_absolute_position_embeddings", False) else "none",
        },
        layer=layer,
        final_norm=not mean,
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    stack, patches = stack_of(spec), patches_of(spec)
    layer = stack.layers[0]
    return {
        **write_image(spec),
        "intermediate_size": layer.ffn_width,
        "use_mask_token": patches.mask_token,
        "use_absolute_position_embeddings": patches.position == "learned",
        "use_relative_position_bias": layer.position == "grid",
        "use_shared_relative_position_bias": layer.position == "grid_shared",
        "layer_scale_init_value": layer.layer_scale or 0.0,
        "use_mean_pooling": not stack.final_norm,
        **stages(stack.depth),
    }


FAMILY = Family(
    "beit",
    _read,
    _write,
    (
        *image_rules(
            "beit.",
            {
                **LAYERS,
                "mixer.scale": "lambda_1",
                "ffn.scale": "lambda_2",
                "mixer.branch.grid.weight": f"attention.attention.{TABLE}",
            },
        ),
        Rule(("stack.relative.weight",), f"beit.encoder.{TABLE}"),
        Rule(("head.norm",), "beit.pooler.layernorm"),
        CLASSIFIER,
    ),
    base=("BeitModel", "BeitForMaskedImageModeling"),
    classifier=("BeitForImageClassification",),
    prefix="beit.",
    reads=PatchSpec,
    ignored=("relative_position_bias.relative_position_index",),
    carried=("beit.pooler.", "layernorm.", "lm_head."),
)
