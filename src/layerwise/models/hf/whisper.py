"""Whisper: a pre-norm encoder of log-mel spectrograms and a decoder of words, with a tied head; keys have no bias."""

from __future__ import annotations

from typing import Any

from layerwise.embed.audio_spec import MelSpec
from layerwise.embed.spec import TokenSpec
from layerwise.models.hf.family import Family, Rule, names, read_activation, stack_of, write_activation
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

EPS = 1e-5
"""Fixed in their code."""


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    width, dropout = config["d_model"], config.get("dropout", 0.0)
    layer: dict[str, Any] = {
        "qkv_bias": True,
        "key_bias": False,
        "out_bias": True,
        "ffn": read_activation(config, "activation_function", "gelu"),
        "ffn_bias": True,
        "norm": "layernorm",
        "norm_eps": EPS,
        "placement": "pre",
        "dropout": dropout,
        "attention_dropout": config.get("attention_dropout", 0.0),
    }
    encoder, decoder = (
        {**layer, "heads": config[f"{side}_attention_heads"], "ffn_width": config[f"{side}_ffn_dim"]} for side in ("encoder", "decoder")
    )
    around: dict[str, Any] = {"width": width, "init_std": config.get("init_std", 0.02)}
    return ModelSpec(
        embedding=MelSpec(mels=config.get("num_mel_bins", 80), max_length=config.get("max_source_positions", 1500), dropout=dropout),
        stack=StackSpec(depth=config["encoder_layers"], layer=LayerSpec(**encoder), **around),
        decoder=StackSpec(depth=config["decoder_layers"], layer=LayerSpec(**decoder, causal=True, cross=True), **around),
        target=TokenSpec(
            vocab=config["vocab_size"], position="learned", max_length=config.get("max_target_positions", 448), dropout=dropout
        ),
        head=HeadSpec(tie=bool(config.get("tie_word_embeddings", True))) if head else None,
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    stack, decoder, target, sound = stack_of(spec), spec.decoder, spec.target, spec.embedding
    assert decoder is not None and target is not None and isinstance(sound, MelSpec)
    below, above = stack.layers[0], decoder.layers[0]
    return {
        "is_encoder_decoder": True,
        "vocab_size": target.vocab,
        "num_mel_bins": sound.mels,
        "d_model": stack.width,
        "encoder_layers": stack.depth,
        "decoder_layers": decoder.depth,
        "encoder_attention_heads": below.heads,
        "decoder_attention_heads": above.heads,
        "encoder_ffn_dim": below.ffn_width,
        "decoder_ffn_dim": above.ffn_width,
        "activation_function": write_activation(below.ffn),
        "max_source_positions": sound.max_length,
        "max_target_positions": target.max_length,
        "dropout": below.dropout,
        "attention_dropout": below.attention_dropout,
        "init_std": stack.init_std,
        "tie_word_embeddings": spec.head is None or spec.head.tie,
    }


def _stack(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The names of one side."""
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
        Rule((f"{ours}.norm",), f"model.{theirs}.layer_norm"),
    )


FAMILY = Family(
    "whisper",
    _read,
    _write,
    (
        *names({"first": "conv1", "second": "conv2", "positions": "embed_positions.weight"}, "embedding.", "model.encoder."),
        *names({"tokens": "embed_tokens", "positions": "embed_positions"}, "target.", "model.decoder."),
        *_stack("stack", "encoder"),
        *_stack("decoder", "decoder"),
        Rule(("head.weight",), "proj_out.weight"),
    ),
    lm=("WhisperForConditionalGeneration",),
    base=("WhisperModel",),
    prefix="model.",
    seq2seq=True,
    reads=MelSpec,
)
