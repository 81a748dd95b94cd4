"""GPT-2: pre-norm LayerNorm, learned positions, query, key and value in one matrix, matrices stored (in, out)."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import TokenSpec
from layerwise.models.hf.family import Family, Rule, names, only, read_activation, stack_of, tokens_of, write_activation
from layerwise.models.hf.layouts import TURNED
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

LAYER = "stack.layers.*."


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    only(config, "add_cross_attention", (False, None), False)
    only(config, "scale_attn_weights", (True,), True)
    only(config, "scale_attn_by_inverse_layer_idx", (False,), False)
    width, dropout = config["n_embd"], config.get("resid_pdrop", 0.1)
    layer = LayerSpec(
        causal=True,
        heads=config["n_head"],
        qkv_bias=True,
        out_bias=True,
        ffn=read_activation(config, "activation_function", "gelu_new"),
        ffn_width=config.get("n_inner") or 4 * width,
        ffn_bias=True,
        norm="layernorm",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        dropout=dropout,
        attention_dropout=config.get("attn_pdrop", 0.1),
    )
    return ModelSpec(
        embedding=TokenSpec(
            vocab=config["vocab_size"],
            position="learned",
            max_length=config.get("n_positions", 1024),
            dropout=config.get("embd_pdrop", 0.1),
        ),
        stack=StackSpec(depth=config["n_layer"], width=width, layer=layer, init_std=config.get("initializer_range", 0.02)),
        head=HeadSpec(tie=bool(config.get("tie_word_embeddings", True))) if head else None,
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    stack, tokens = stack_of(spec), tokens_of(spec)
    layer = stack.layers[0]
    return {
        "vocab_size": tokens.vocab,
        "n_embd": stack.width,
        "n_layer": stack.depth,
        "n_head": layer.heads,
        "n_inner": layer.ffn_width,
        "n_positions": tokens.max_length,
        "activation_function": write_activation(layer.ffn),
        "layer_norm_epsilon": layer.norm_eps,
        "resid_pdrop": layer.dropout,
        "attn_pdrop": layer.attention_dropout,
        "embd_pdrop": tokens.dropout,
        "initializer_range": stack.init_std,
        "tie_word_embeddings": spec.head is None or spec.head.tie,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }


FAMILY = Family(
    "gpt2",
    _read,
    _write,
    (
        *names({"embedding.tokens": "wte", "embedding.positions": "wpe", "stack.norm": "ln_f"}, theirs="transformer."),
        *names({"mixer.norm": "ln_1", "ffn.norm": "ln_2"}, LAYER, "transformer.h.*."),
        Rule(tuple(f"{LAYER}mixer.branch.{role}" for role in "qkv"), "transformer.h.*.attn.c_attn", TURNED),
        *names(
            {"mixer.branch.o": "attn.c_proj", "ffn.branch.up": "mlp.c_fc", "ffn.branch.down": "mlp.c_proj"},
            LAYER,
            "transformer.h.*.",
            TURNED,
        ),
        Rule(("head.weight",), "lm_head.weight"),
    ),
    lm=("GPT2LMHeadModel",),
    base=("GPT2Model",),
    prefix="transformer.",
    ignored=(".attn.bias", ".attn.masked_bias"),
)
