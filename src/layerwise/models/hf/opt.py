"""OPT: LayerNorm before (or, in one size, after) each branch, ReLU, learned positions counted from two."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import TokenSpec
from layerwise.models.hf.family import Family, names, only, read_activation, stack_of, tokens_of, write_activation
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

EPS, OFFSET = 1e-5, 2
"""Fixed in their code."""


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    width, before = config["hidden_size"], bool(config.get("do_layer_norm_before", True))
    only(config, "word_embed_proj_dim", (width, None), width)
    only(config, "layer_norm_elementwise_affine", (True,), True)
    biased, dropout = bool(config.get("enable_bias", True)), config.get("dropout", 0.1)
    layer = LayerSpec(
        causal=True,
        heads=config["num_attention_heads"],
        qkv_bias=biased,
        out_bias=biased,
        ffn=read_activation(config, "activation_function", "relu"),
        ffn_width=config["ffn_dim"],
        ffn_bias=biased,
        norm="layernorm",
        norm_eps=EPS,
        placement="pre" if before else "post",
        dropout=dropout,
        attention_dropout=config.get("attention_dropout", 0.0),
    )
    return ModelSpec(
        embedding=TokenSpec(
            vocab=config["vocab_size"], position="learned", max_length=config.get("max_position_embeddings", 2048), offset=OFFSET
        ),
        stack=StackSpec(
            depth=config["num_hidden_layers"],
            width=width,
            layer=layer,
            final_norm=before and not config.get("_remove_final_layer_norm", False),
            init_std=config.get("init_std", 0.02),
        ),
        head=HeadSpec(tie=bool(config.get("tie_word_embeddings", True))) if head else None,
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    stack = stack_of(spec)
    layer = stack.layers[0]
    return {
        "vocab_size": tokens_of(spec).vocab,
        "hidden_size": stack.width,
        "word_embed_proj_dim": stack.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": layer.heads,
        "ffn_dim": layer.ffn_width,
        "activation_function": write_activation(layer.ffn),
        "max_position_embeddings": tokens_of(spec).max_length,
        "do_layer_norm_before": layer.placement != "post",
        "_remove_final_layer_norm": layer.placement != "post" and not stack.final_norm,
        "layer_norm_elementwise_affine": True,
        "enable_bias": layer.qkv_bias,
        "dropout": layer.dropout,
        "attention_dropout": layer.attention_dropout,
        "init_std": stack.init_std,
        "tie_word_embeddings": spec.head is None or spec.head.tie,
    }


FAMILY = Family(
    "opt",
    _read,
    _write,
    (
        *names(
            {"embedding.tokens": "embed_tokens", "embedding.positions": "embed_positions", "stack.norm": "final_layer_norm"},
            theirs="model.decoder.",
        ),
        *names(
            {
                **{f"mixer.branch.{role}": f"self_attn.{role}_proj" for role in "qkv"},
                "mixer.branch.o": "self_attn.out_proj",
                "mixer.norm": "self_attn_layer_norm",
                "ffn.branch.up": "fc1",
                "ffn.branch.down": "fc2",
                "ffn.norm": "final_layer_norm",
            },
            "stack.layers.*.",
            "model.decoder.layers.*.",
        ),
        *names({"head.weight": "lm_head.weight"}),
    ),
    lm=("OPTForCausalLM",),
    base=("OPTModel",),
    prefix="model.",
)
