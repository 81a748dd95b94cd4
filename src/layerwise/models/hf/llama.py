"""Llama: pre-norm RMSNorm, rotary positions, SwiGLU, grouped-query attention. Its relatives start from what is here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerwise.embed.spec import TokenSpec
from layerwise.models.hf.family import Family, Rule, names, only, stack_of, tokens_of
from layerwise.models.hf.rope import read_rope, write_rope
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

RULES: tuple[Rule, ...] = (
    *names({"embedding.tokens": "model.embed_tokens", "stack.norm": "model.norm", "head.weight": "lm_head.weight"}),
    *names(
        {
            "mixer.norm": "input_layernorm",
            **{f"mixer.branch.{role}": f"self_attn.{role}_proj" for role in "qkvo"},
            **{f"mixer.branch.{role}_norm": f"self_attn.{role}_norm" for role in "qk"},
            "ffn.norm": "post_attention_layernorm",
            **{f"ffn.branch.{role}": f"mlp.{role}_proj" for role in ("gate", "up", "down")},
        },
        "stack.layers.*.",
        "model.layers.*.",
    ),
)
IGNORED = ("rotary_emb.inv_freq",)


def read_decoder(config: dict[str, Any], head: bool, windows: Sequence[int | None] = (), **layer: Any) -> ModelSpec:
    """Their config to our description; `layer` holds what the member of the family adds, `windows` one entry a layer."""
    heads, depth, width = config["num_attention_heads"], config["num_hidden_layers"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    fields: dict[str, Any] = {
        "causal": True,
        "position": "rotary",
        "ffn": "swiglu",
        "norm": "rmsnorm",
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "ffn_width": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "attention_dropout": config.get("attention_dropout") or 0.0,
        **read_rope(config, head_dim),
    }
    if fields["ffn"] == layer.get("ffn", "swiglu"):
        only(config, "hidden_act", ("silu", "swish"), "silu")
    return ModelSpec(
        embedding=TokenSpec(vocab=config["vocab_size"]),
        stack=StackSpec(
            depth=depth,
            width=width,
            layer=LayerSpec(**fields | layer),
            overrides={str(i): {"window": window} for i, window in enumerate(windows) if window is not None},
            init_std=config.get("initializer_range", 0.02),
        ),
        head=HeadSpec(tie=bool(config.get("tie_word_embeddings", False))) if head else None,
    )


def write_decoder(spec: ModelSpec) -> dict[str, Any]:
    """Our description to the config keys that the whole family has."""
    stack = stack_of(spec)
    layer = stack.layers[0]
    return {
        "vocab_size": tokens_of(spec).vocab,
        "hidden_size": stack.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "intermediate_size": layer.ffn_width,
        "hidden_act": "silu",
        "rms_norm_eps": layer.norm_eps,
        **write_rope(layer),
        "attention_dropout": layer.attention_dropout,
        "tie_word_embeddings": spec.head is not None and spec.head.tie,
        "initializer_range": stack.init_std,
        "use_cache": True,
    }


def windows_of(spec: ModelSpec) -> list[int | None]:
    """The attention window of every layer."""
    return [layer.window for layer in stack_of(spec).layers]


def read_windows(config: dict[str, Any], default: Sequence[str]) -> list[int | None]:
    """The windows of a config that says layer by layer which ones slide; `default` are the kinds where it does not."""
    window = config.get("sliding_window", 4096)
    return [window if kind == "sliding_attention" else None for kind in config.get("layer_types") or default]


def write_windows(spec: ModelSpec) -> dict[str, Any]:
    """The config keys of windows that differ from layer to layer (there is one width of window)."""
    windows = windows_of(spec)
    return {
        "sliding_window": next((w for w in windows if w), None),
        "layer_types": ["sliding_attention" if w else "full_attention" for w in windows],
    }


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    attention, mlp = bool(config.get("attention_bias", False)), bool(config.get("mlp_bias", False))
    return read_decoder(config, head, qkv_bias=attention, out_bias=attention, ffn_bias=mlp)


def _write(spec: ModelSpec) -> dict[str, Any]:
    layer = stack_of(spec).layers[0]
    return {**write_decoder(spec), "attention_bias": layer.qkv_bias, "mlp_bias": layer.ffn_bias}


FAMILY = Family("llama", _read, _write, RULES, ("LlamaForCausalLM",), ("LlamaModel",), "model.", ignored=IGNORED)
