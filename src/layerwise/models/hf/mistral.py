"""Mistral: Llama without biases whose layers all have the same sliding window, or none."""

from __future__ import annotations

from typing import Any

from layerwise.models.hf.family import Family
from layerwise.models.hf.llama import IGNORED, RULES, read_decoder, windows_of, write_decoder
from layerwise.models.spec import ModelSpec


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    # The config class has a number of key/value heads of its own.
    return read_decoder({"num_key_value_heads": 8, **config}, head, [config.get("sliding_window", 4096)] * config["num_hidden_layers"])


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {**write_decoder(spec), "sliding_window": windows_of(spec)[0]}


FAMILY = Family("mistral", _read, _write, RULES, ("MistralForCausalLM",), ("MistralModel",), "model.", ignored=IGNORED)
