"""GPT-NeoX (Pythia): attention and feed-forward in parallel, a part of every head rotated, query, key and value interleaved by head."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import TokenSpec
from layerwise.models.hf.family import Family, Rule, names, read_activation, stack_of, tokens_of, write_activation
from layerwise.models.hf.layouts import BY_HEAD
from layerwise.models.hf.rope import read_rope, write_rope
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

LAYER = "stack.layers.*."


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    biased, dropout = bool(config.get("attention_bias", True)), config.get("hidden_dropout", 0.0)
    layer = LayerSpec(
        causal=True,
        heads=heads,
        position="rotary",
        **read_rope(config, width // heads, share=0.25),
        qkv_bias=biased,
        out_bias=biased,
        ffn=read_activation(config, "hidden_act", "gelu"),
        ffn_width=config["intermediate_size"],
        ffn_bias=True,
        norm="layernorm",
        norm_eps=config.get("layer_norm_eps", 1e-5),
        parallel=bool(config.get("use_parallel_residual", True)),
        dropout=dropout,
        attention_dropout=config.get("attention_dropout", 0.0),
    )
    return ModelSpec(
        embedding=TokenSpec(vocab=config["vocab_size"], dropout=dropout),
        stack=StackSpec(depth=config["num_hidden_layers"], width=width, layer=layer, init_std=config.get("initializer_range", 0.02)),
        head=HeadSpec(tie=bool(config.get("tie_word_embeddings", False))) if head else None,
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    stack = stack_of(spec)
    layer = stack.layers[0]
    rope = write_rope(layer)
    # Without a share of their own, they rotate a quarter.
    rope["rope_parameters"].setdefault("partial_rotary_factor", 1.0)
    return {
        "vocab_size": tokens_of(spec).vocab,
        "hidden_size": stack.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": layer.heads,
        "intermediate_size": layer.ffn_width,
        "hidden_act": write_activation(layer.ffn),
        **rope,
        "rotary_emb_base": layer.rope_theta,
        "rotary_pct": rope["rope_parameters"]["partial_rotary_factor"],
        "layer_norm_eps": layer.norm_eps,
        "use_parallel_residual": layer.parallel,
        "attention_bias": layer.qkv_bias,
        "hidden_dropout": layer.dropout,
        "attention_dropout": layer.attention_dropout,
        "initializer_range": stack.init_std,
        "tie_word_embeddings": spec.head is not None and spec.head.tie,
        "use_cache": True,
    }


FAMILY = Family(
    "gpt_neox",
    _read,
    _write,
    (
        *names({"embedding.tokens": "embed_in", "stack.norm": "final_layer_norm"}, theirs="gpt_neox."),
        *names(
            {
                "mixer.norm": "input_layernorm",
                "mixer.branch.o": "attention.dense",
                "ffn.norm": "post_attention_layernorm",
                "ffn.branch.up": "mlp.dense_h_to_4h",
                "ffn.branch.down": "mlp.dense_4h_to_h",
            },
            LAYER,
            "gpt_neox.layers.*.",
        ),
        Rule(tuple(f"{LAYER}mixer.branch.{role}" for role in "qkv"), "gpt_neox.layers.*.attention.query_key_value", BY_HEAD),
        Rule(("head.weight",), "embed_out.weight", also=("lm_head.weight",)),
    ),
    lm=("GPTNeoXForCausalLM",),
    base=("GPTNeoXModel",),
    prefix="gpt_neox.",
    ignored=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
