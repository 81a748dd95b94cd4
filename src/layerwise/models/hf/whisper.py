"""Whisper: a pre-norm encoder of log-mel spectrograms and a decoder of words, with a tied head; keys have no bias."""

from __future__ import annotations

from typing import Any

from layerwise.embed.audio_spec import MelSpec
from layerwise.embed.spec import TokenSpec
from layerwise.models.hf.bart import layer_names, read_sides, write_sides
from layerwise.models.hf.family import Family, Rule, names, read_activation
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
    encoder, decoder = read_sides(config, layer)
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
    target, sound = spec.target, spec.embedding
    assert target is not None and isinstance(sound, MelSpec)
    return {
        **write_sides(spec),
        "vocab_size": target.vocab,
        "num_mel_bins": sound.mels,
        "max_source_positions": sound.max_length,
        "max_target_positions": target.max_length,
    }


def _stack(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The names of one side."""
    return (*layer_names(ours, theirs), Rule((f"{ours}.norm",), f"model.{theirs}.layer_norm"))


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
