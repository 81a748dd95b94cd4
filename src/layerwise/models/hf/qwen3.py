"""Qwen3: Llama with normalized query and key heads, and windows on some layers if asked for."""

from __future__ import annotations

from typing import Any

from layerwise.models.hf.family import Family, stack_of
from layerwise.models.hf.llama import IGNORED, RULES, read_decoder, write_decoder
from layerwise.models.hf.qwen2 import read_some_windows, write_some_windows
from layerwise.models.spec import ModelSpec


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    biased = bool(config.get("attention_bias", False))
    # The config class has a size and a number of heads of its own, whatever the width.
    config = {"head_dim": 128, "num_key_value_heads": 32, **config}
    return read_decoder(config, head, read_some_windows(config), qkv_bias=biased, out_bias=biased, qk_norm=True)


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {**write_decoder(spec), **write_some_windows(spec), "attention_bias": stack_of(spec).layers[0].qkv_bias}


FAMILY = Family("qwen3", _read, _write, RULES, ("Qwen3ForCausalLM",), ("Qwen3Model",), "model.", ignored=IGNORED)
