"""CLIP's text tower: a causal pre-norm stack whose vector is taken where the text ends, perhaps projected."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import TokenSpec
from layerwise.models.hf.family import Family, Rule, names, read_activation, stack_of, tokens_of, write_activation
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

LEGACY_END = 2
"""With this `eos_token_id` their code takes the highest token for the end, as OpenAI's does; no CLIP text ends with token 2."""
LAYERS = {
    **{f"mixer.branch.{role}": f"self_attn.{role}_proj" for role in "qkv"},
    "mixer.branch.o": "self_attn.out_proj",
    "mixer.norm": "layer_norm1",
    "ffn.norm": "layer_norm2",
    "ffn.branch.up": "mlp.fc1",
    "ffn.branch.down": "mlp.fc2",
}


def read_layers(config: dict[str, Any], width: int, heads: int, inner: int, **other: Any) -> StackSpec:
    """Their config to the stack of a tower; `width`, `heads` and `inner` are its defaults, `other` are further fields of a layer."""
    final_norm = other.pop("final_norm")
    layer = LayerSpec(
        heads=config.get("num_attention_heads", heads),
        ffn=read_activation(config, "hidden_act", "quick_gelu"),
        ffn_width=config.get("intermediate_size", inner),
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        norm="layernorm",
        norm_eps=config.get("layer_norm_eps", 1e-5),
        placement="pre",
        attention_dropout=config.get("attention_dropout", 0.0),
        **other,
    )
    return StackSpec(
        depth=config.get("num_hidden_layers", 12),
        width=config.get("hidden_size", width),
        layer=layer,
        final_norm=final_norm,
        init_std=config.get("initializer_range", 0.02),
    )


def write_layers(spec: ModelSpec) -> dict[str, Any]:
    """The stack of a tower to the config keys that both towers have."""
    stack = stack_of(spec)
    layer = stack.layers[0]
    projected = {} if spec.head is None or spec.head.kind != "projection" else {"projection_dim": spec.head.size}
    return {
        "hidden_size": stack.width,
        "intermediate_size": layer.ffn_width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": layer.heads,
        "hidden_act": write_activation(layer.ffn),
        "layer_norm_eps": layer.norm_eps,
        "attention_dropout": layer.attention_dropout,
        "initializer_range": stack.init_std,
        **projected,
    }


def read_text(config: dict[str, Any], size: int | None) -> ModelSpec:
    """Their config to our description; `size` is that of the projection, None without one."""
    end = config.get("eos_token_id", 49407)
    head = None if size is None else HeadSpec(kind="projection", size=size, pool="end", end_token=None if end == LEGACY_END else end)
    return ModelSpec(
        embedding=TokenSpec(
            vocab=config.get("vocab_size", 49408), position="learned", max_length=config.get("max_position_embeddings", 77)
        ),
        stack=read_layers(config, 512, 8, 2048, causal=True, final_norm=True),
        head=head,
    )


def write_text(spec: ModelSpec) -> dict[str, Any]:
    """Our description to their config."""
    tokens, head = tokens_of(spec), spec.head
    ends = {} if head is None else {"eos_token_id": LEGACY_END if head.end_token is None else head.end_token}
    return {**write_layers(spec), "vocab_size": tokens.vocab, "max_position_embeddings": tokens.max_length, **ends}


def text_rules(ours: str = "") -> tuple[Rule, ...]:
    """The names of the tower and its projection."""
    return (
        *names({"tokens": "token_embedding", "positions": "position_embedding"}, f"{ours}embedding.", "text_model.embeddings."),
        *names(LAYERS, f"{ours}stack.layers.*.", "text_model.encoder.layers.*."),
        Rule((f"{ours}stack.norm",), "text_model.final_layer_norm"),
        Rule((f"{ours}head.out",), "text_projection"),
    )


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    return read_text(config, config.get("projection_dim", 512) if head else None)


FAMILY = Family(
    "clip_text_model",
    _read,
    write_text,
    text_rules(),
    base=("CLIPTextModel",),
    classifier=("CLIPTextModelWithProjection",),
    prefix="text_model.",
    ignored=("embeddings.position_ids",),
)
