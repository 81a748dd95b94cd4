"""Gemma (the first): Llama with scaled token vectors, norms whose gain is 1 + weight, and GELU in the gate."""

from __future__ import annotations

import dataclasses
from typing import Any

from layerwise.models.hf.family import Family, only, stack_of, tokens_of
from layerwise.models.hf.llama import IGNORED, RULES, read_decoder, write_decoder
from layerwise.models.spec import HeadSpec, ModelSpec


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    # "gelu" in the first published configs means the tanh form, as transformers reads it.
    only(config, "hidden_act", ("gelu_pytorch_tanh", "gelu", "gelu_new"), "gelu_pytorch_tanh")
    only(config, "use_bidirectional_attention", (None, False), None)
    biased = bool(config.get("attention_bias", False))
    # The config class has a size and a number of heads of its own, whatever the width.
    config = {"head_dim": 256, "num_key_value_heads": 16, **config}
    spec = read_decoder(config, head, ffn="geglu_tanh", norm="rmsnorm_zero", qkv_bias=biased, out_bias=biased)
    tied = HeadSpec(tie=bool(config.get("tie_word_embeddings", True))) if head else None
    embedding = dataclasses.replace(tokens_of(spec), scale=float(config["hidden_size"] ** 0.5))
    return dataclasses.replace(spec, embedding=embedding, head=tied)


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {
        **write_decoder(spec),
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": spec.head is None or spec.head.tie,
        "attention_bias": stack_of(spec).layers[0].qkv_bias,
        "use_bidirectional_attention": None,
    }


FAMILY = Family("gemma", _read, _write, RULES, ("GemmaForCausalLM",), ("GemmaModel",), "model.", ignored=IGNORED)
