"""Qwen2: Llama with biases on query, key and value only, and windows on some layers if asked for."""

from __future__ import annotations

from typing import Any

from layerwise.models.hf.family import Family
from layerwise.models.hf.llama import IGNORED, RULES, read_decoder, read_windows, write_decoder, write_windows
from layerwise.models.spec import ModelSpec


def read_some_windows(config: dict[str, Any]) -> list[int | None]:
    """One window a layer: none unless `use_sliding_window`, then from layer `max_window_layers` on, or as `layer_types` says."""
    depth, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
    if not config.get("use_sliding_window", False):
        return [None] * depth
    return read_windows(config, ["sliding_attention" if i >= first else "full_attention" for i in range(depth)])


def write_some_windows(spec: ModelSpec) -> dict[str, Any]:
    """The config keys that `read_some_windows` reads."""
    found = write_windows(spec)
    return {**found, "use_sliding_window": found["sliding_window"] is not None, "max_window_layers": len(found["layer_types"])}


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    # The config class has a number of key/value heads of its own.
    config = {"num_key_value_heads": 32, **config}
    return read_decoder(config, head, read_some_windows(config), qkv_bias=True)


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {**write_decoder(spec), **write_some_windows(spec)}


FAMILY = Family("qwen2", _read, _write, RULES, ("Qwen2ForCausalLM",), ("Qwen2Model",), "model.", ignored=IGNORED)
