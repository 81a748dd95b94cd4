"""Llama and its near relatives: pre-norm RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.models.hf.family import Family, Pair, only, same
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

LAYER: dict[str, Any] = {
    "causal": True,
    "position": "rotary",
    "ffn": "swiglu",
    "norm": "rmsnorm",
    "placement": "pre",
    "mixer": "attention",
    "cross": False,
}
UNIFORM = ("heads", "kv_heads", "head_dim", "ffn_width", "norm_eps", "rope_theta", "qkv_bias", "out_bias", "ffn_bias", "qk_norm")


def read(config: dict[str, Any]) -> ModelSpec:
    """Their config to our description."""
    only(config, "hidden_act", ("silu",), "silu")
    kind = config["model_type"]
    rope = config.get("rope_parameters") or {}
    if (rope.get("rope_type") or (config.get("rope_scaling") or {}).get("rope_type", "default")) != "default":
        raise BadInput(f"config.json: rotary scaling {rope or config['rope_scaling']} is not known here; layerwise reads the default one")
    heads, depth, width = config["num_attention_heads"], config["num_hidden_layers"], config["hidden_size"]
    layer = LayerSpec(
        **LAYER,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        ffn_width=config["intermediate_size"],
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        qkv_bias=kind == "qwen2" or bool(config.get("attention_bias", False)),
        out_bias=kind != "qwen2" and bool(config.get("attention_bias", False)),
        ffn_bias=bool(config.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
    )
    overrides = {str(i): {"window": window} for i, window in enumerate(_windows(config, depth)) if window is not None}
    return ModelSpec(
        embedding=TokenSpec(vocab=config["vocab_size"]),
        stack=StackSpec(depth=depth, width=width, layer=layer, overrides=overrides, init_std=config.get("initializer_range", 0.02)),
        head=HeadSpec(kind="lm", tie=bool(config.get("tie_word_embeddings", False))),
    )


def write(spec: ModelSpec) -> dict[str, Any]:
    """Our description to their config."""
    stack = decoder_stack(spec)
    layer = stack.layers[0]
    windows = [s.window for s in stack.layers]
    kind = _kind(spec)
    assert isinstance(spec.embedding, TokenSpec) and spec.head is not None
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [
            {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]
        ],
        "vocab_size": spec.embedding.vocab,
        "hidden_size": stack.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "intermediate_size": layer.ffn_width,
        "hidden_act": "silu",
        "rms_norm_eps": layer.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": layer.rope_theta},
        "tie_word_embeddings": spec.head.tie,
        "initializer_range": stack.init_std,
        "use_cache": True,
    }
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = layer.qkv_bias
    if kind == "llama":
        config["mlp_bias"] = layer.ffn_bias
    if kind == "mistral":
        config["sliding_window"] = windows[0]
    if kind in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": any(windows), "sliding_window": next((w for w in windows if w), None)}
        config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return config


def pairs(spec: ModelSpec) -> list[Pair]:
    """The table of names."""
    assert spec.head is not None
    table = same(("embedding.tokens.weight", "model.embed_tokens.weight"), ("stack.norm.weight", "model.norm.weight"))
    if not spec.head.tie:
        table += same(("head.weight", "lm_head.weight"))
    for i, layer in enumerate(decoder_stack(spec).layers):
        ours, theirs = f"stack.layers.{i}", f"model.layers.{i}"
        table += same(
            (f"{ours}.mixer.norm.weight", f"{theirs}.input_layernorm.weight"),
            (f"{ours}.ffn.norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        )
        for role in "qkvo":
            biased = layer.out_bias if role == "o" else layer.qkv_bias
            for leaf in ("weight", "bias") if biased else ("weight",):
                table += same((f"{ours}.mixer.branch.{role}.{leaf}", f"{theirs}.self_attn.{role}_proj.{leaf}"))
        for role in ("gate", "up", "down"):
            for leaf in ("weight", "bias") if layer.ffn_bias else ("weight",):
                table += same((f"{ours}.ffn.branch.{role}.{leaf}", f"{theirs}.mlp.{role}_proj.{leaf}"))
        if layer.qk_norm:
            table += [Pair((f"{ours}.mixer.branch.{r}_norm.weight",), f"{theirs}.self_attn.{r}_norm.weight") for r in "qk"]
    return table


def obstacle(spec: ModelSpec) -> str | None:
    """The first thing in a description that no member of this family has."""
    stack, embedding, head = spec.stack, spec.embedding, spec.head
    if not isinstance(stack, StackSpec) or not isinstance(embedding, TokenSpec) or spec.decoder is not None:
        return "it is not a decoder over tokens"
    if not stack.depth:
        return "it has no layer"
    for i, layer in enumerate(stack.layers):
        for name, expected in LAYER.items():
            value = getattr(layer, name)
            # A layer-norm-scaled layer computes what a pre-norm layer does: only its initial gains differ.
            if value != expected and not (name == "placement" and value == "lns"):
                return f"layer {i} has {name} {value!r}; Llama's layers have {expected!r}"
        for name in UNIFORM:
            if getattr(layer, name) != getattr(stack.layers[0], name):
                return f"{name} differs between layers 0 and {i}"
        if any(s.kind != "dense" for s in layer.linears.values()):
            return f"layer {i} has {next(s.kind for s in layer.linears.values() if s.kind != 'dense')} linears: merge them first"
    if embedding.position != "none" or embedding.types or embedding.norm or embedding.scale != 1.0:
        return "its embedding has positions, token types, a norm or a scale"
    if head is None or head.kind != "lm" or head.bias or head.transform:
        return "its head is not a plain lm head"
    return None if stack.final_norm else "it has no final norm"


def decoder_stack(spec: ModelSpec) -> StackSpec:
    """The description's stack, which `obstacle` has found to be of transformer layers."""
    assert isinstance(spec.stack, StackSpec)
    return spec.stack


def _kind(spec: ModelSpec) -> str:
    """The member of the family that has all that a description asks for."""
    stack = decoder_stack(spec)
    layer, windows = stack.layers[0], {s.window for s in stack.layers}
    if layer.qk_norm:
        return "qwen3"
    if layer.qkv_bias and not layer.out_bias:
        return "qwen2"
    if windows == {None}:
        return "llama"
    return "mistral" if len(windows) == 1 else "qwen2"


def _windows(config: dict[str, Any], depth: int) -> list[int | None]:
    window = config.get("sliding_window")
    if config["model_type"] == "llama" or not window:
        return [None] * depth
    if config["model_type"] == "mistral":
        return [window] * depth
    kinds = config.get("layer_types")
    if kinds is not None:
        return [window if k == "sliding_attention" else None for k in kinds]
    if not config.get("use_sliding_window", False):
        return [None] * depth
    return [window if i >= config.get("max_window_layers", depth) else None for i in range(depth)]


FAMILY = Family("llama", ("llama", "mistral", "qwen2", "qwen3"), read, write, pairs, obstacle, ignored=("rotary_emb.inv_freq",))
