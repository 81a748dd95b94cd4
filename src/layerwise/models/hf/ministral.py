"""Ministral: Mistral whose layers choose one by one between the sliding window and full attention."""

from __future__ import annotations

from typing import Any

from layerwise.models.hf.family import Family
from layerwise.models.hf.llama import IGNORED, RULES, read_decoder, read_windows, write_decoder, write_windows
from layerwise.models.spec import ModelSpec


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    # The config class has a number of key/value heads of its own.
    config = {"num_key_value_heads": 8, **config}
    return read_decoder(config, head, read_windows(config, ["sliding_attention"] * config["num_hidden_layers"]))


def _write(spec: ModelSpec) -> dict[str, Any]:
    found = write_windows(spec)
    # Their code wants a window even where no layer has one.
    return {**write_decoder(spec), **found, "sliding_window": found["sliding_window"] or 4096}


FAMILY = Family("ministral", _read, _write, RULES, ("MinistralForCausalLM",), ("MinistralModel",), "model.", ignored=IGNORED)
