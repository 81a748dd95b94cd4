"""BART: a post-norm encoder and decoder with learned positions counted from two; both read the same token vectors."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import TokenSpec
from layerwise.models.hf.family import Family, Rule, names, read_activation, stack_of, tokens_of, write_activation
from layerwise.models.hf.layouts import ROW
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

EPS, OFFSET = 1e-5, 2
"""Fixed in their code."""


def read(config: dict[str, Any], head: bool) -> ModelSpec:
    """Their config to our description."""
    width, dropout = config["d_model"], config.get("dropout", 0.1)
    layer: dict[str, Any] = {
        "qkv_bias": True,
        "out_bias": True,
        "ffn": read_activation(config, "activation_function", "gelu"),
        "ffn_bias": True,
        "norm": "layernorm",
        "norm_eps": EPS,
        "placement": "post",
        "dropout": dropout,
        "attention_dropout": config.get("attention_dropout", 0.0),
    }
    encoder, decoder = read_sides(config, layer)
    embedding = TokenSpec(
        vocab=config["vocab_size"],
        position="learned",
        max_length=config.get("max_position_embeddings", 1024),
        offset=OFFSET,
        scale=width**0.5 if config.get("scale_embedding", False) else 1.0,
        norm="layernorm",
        norm_eps=EPS,
        dropout=dropout,
    )
    around: dict[str, Any] = {"width": width, "final_norm": False, "init_std": config.get("init_std", 0.02)}
    return ModelSpec(
        embedding=embedding,
        stack=StackSpec(depth=config["encoder_layers"], layer=LayerSpec(**encoder), **around),
        decoder=StackSpec(depth=config["decoder_layers"], layer=LayerSpec(**decoder, causal=True, cross=True), **around),
        target=embedding,
        head=HeadSpec(tie=bool(config.get("tie_word_embeddings", True)), bias=True) if head else None,
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """Our description to their config."""
    tokens = tokens_of(spec)
    return {
        **write_sides(spec),
        "vocab_size": tokens.vocab,
        "max_position_embeddings": tokens.max_length,
        "scale_embedding": tokens.scale != 1.0,
    }


def read_sides(config: dict[str, Any], layer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A layer of the encoder and one of the decoder: what both have, and the numbers that each side has of its own."""
    encoder, decoder = (
        {**layer, "heads": config[f"{side}_attention_heads"], "ffn_width": config[f"{side}_ffn_dim"]} for side in ("encoder", "decoder")
    )
    return encoder, decoder


def write_sides(spec: ModelSpec) -> dict[str, Any]:
    """The config keys of both stacks, which this family's relatives share."""
    stack, decoder = stack_of(spec), spec.decoder
    assert decoder is not None
    below, above = stack.layers[0], decoder.layers[0]
    return {
        "is_encoder_decoder": True,
        "d_model": stack.width,
        "encoder_layers": stack.depth,
        "decoder_layers": decoder.depth,
        "encoder_attention_heads": below.heads,
        "decoder_attention_heads": above.heads,
        "encoder_ffn_dim": below.ffn_width,
        "decoder_ffn_dim": above.ffn_width,
        "activation_function": write_activation(below.ffn),
        "dropout": below.dropout,
        "attention_dropout": below.attention_dropout,
        "init_std": stack.init_std,
        "tie_word_embeddings": spec.head is None or spec.head.tie,
    }


def _stack(ours: str, theirs: str, embedding: str) -> tuple[Rule, ...]:
    """The names of one side and its embedding."""
    return (
        *names({"positions": "embed_positions", "norm": "layernorm_embedding"}, f"{embedding}.", f"model.{theirs}."),
        *layer_names(ours, theirs),
    )


def layer_names(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The names inside the layers of one side, for this family and its relatives."""
    attention = {**{f"branch.{role}": f"{role}_proj" for role in "qkv"}, "branch.o": "out_proj"}
    return (
        *names(attention, f"{ours}.layers.*.mixer.", f"model.{theirs}.layers.*.self_attn."),
        *names(attention, f"{ours}.layers.*.cross.", f"model.{theirs}.layers.*.encoder_attn."),
        *names(
            {
                "mixer.norm": "self_attn_layer_norm",
                "cross.norm": "encoder_attn_layer_norm",
                "ffn.branch.up": "fc1",
                "ffn.branch.down": "fc2",
                "ffn.norm": "final_layer_norm",
            },
            f"{ours}.layers.*.",
            f"model.{theirs}.layers.*.",
        ),
    )


FAMILY = Family(
    "bart",
    read,
    write,
    (
        Rule(("embedding.tokens",), "model.shared", also=("model.encoder.embed_tokens", "model.decoder.embed_tokens")),
        *_stack("stack", "encoder", "embedding"),
        *_stack("decoder", "decoder", "target"),
        Rule(("head.weight",), "lm_head.weight"),
        Rule(("head.bias",), "final_logits_bias", ROW),
    ),
    lm=("BartForConditionalGeneration",),
    base=("BartModel",),
    prefix="model.",
    seq2seq=True,
    shared=(("target.tokens.weight", "embedding.tokens.weight"),),
)
