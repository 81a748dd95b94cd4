"""T5: an encoder and a decoder with relative positions, unscaled attention, RMSNorm; the feed-forward gated or not."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import TokenSpec
from layerwise.models.hf.family import Family, Rule, names, only, stack_of, tokens_of
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "gelu_new": "gelu_tanh",
    "gated-gelu": "geglu_tanh",
    "gated-silu": "swiglu",
}
"""Their names -> ours. A gated GELU is the tanh form there."""


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    width, dropout = config["d_model"], config.get("dropout_rate", 0.1)
    ffn: Any = ACTIVATIONS[only(config, "feed_forward_proj", tuple(ACTIVATIONS), "relu")]
    layer: dict[str, Any] = {
        "heads": config["num_heads"],
        "head_dim": config["d_kv"],
        "position": "relative",
        "attention_scale": 1.0,
        "ffn": ffn,
        "ffn_width": config["d_ff"],
        "norm": "rmsnorm",
        "norm_eps": config.get("layer_norm_epsilon", 1e-6),
        "dropout": dropout,
        "attention_dropout": dropout,
    }
    around: dict[str, Any] = {
        "width": width,
        "buckets": config.get("relative_attention_num_buckets", 32),
        "max_distance": config.get("relative_attention_max_distance", 128),
    }
    # A head tied to the embedding reads scaled vectors; configs written by newer transformers say so separately.
    tie = config.get("tie_word_embeddings", True) is not False
    scaled = config.get("scale_decoder_outputs", tie)
    return ModelSpec(
        embedding=TokenSpec(vocab=config["vocab_size"], dropout=dropout),
        stack=StackSpec(depth=config["num_layers"], layer=LayerSpec(**layer), **around),
        decoder=StackSpec(
            depth=config.get("num_decoder_layers") or config["num_layers"], layer=LayerSpec(**layer, causal=True, cross=True), **around
        ),
        head=HeadSpec(tie=tie, scale=width**-0.5 if scaled else 1.0) if head else None,
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    stack = stack_of(spec)
    layer = stack.layers[0]
    return {
        "is_encoder_decoder": True,
        "vocab_size": tokens_of(spec).vocab,
        "d_model": stack.width,
        "d_kv": layer.head_dim,
        "d_ff": layer.ffn_width,
        "num_heads": layer.heads,
        "num_layers": stack.depth,
        "num_decoder_layers": spec.decoder.depth if spec.decoder is not None else stack.depth,
        "relative_attention_num_buckets": stack.buckets,
        "relative_attention_max_distance": stack.max_distance,
        "feed_forward_proj": next((theirs for theirs, ours in ACTIVATIONS.items() if ours == layer.ffn), "relu"),
        "layer_norm_epsilon": layer.norm_eps,
        "dropout_rate": layer.dropout,
        "tie_word_embeddings": spec.head is None or spec.head.tie,
        "scale_decoder_outputs": spec.head is None or spec.head.scale != 1.0,
    }


def _gated(spec: ModelSpec) -> bool:
    return any(layer.gated for layer in stack_of(spec).layers)


def _ungated(spec: ModelSpec) -> bool:
    return not _gated(spec)


def _stack(ours: str, theirs: str, cross: bool) -> tuple[Rule, ...]:
    """The names of one side. Sub-layers are numbered: attention, cross-attention if there is one, feed-forward."""
    inner, block = f"{ours}.layers.*", f"{theirs}.block.*.layer"
    dense = f"{block}.{2 if cross else 1}.DenseReluDense"
    return (
        *names({f"{ours}.norm": f"{theirs}.final_layer_norm"}),
        Rule((f"{ours}.relative.weight",), f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        *names({role: role for role in "qkvo"}, f"{inner}.mixer.branch.", f"{block}.0.SelfAttention."),
        *names({f"{inner}.mixer.norm": f"{block}.0.layer_norm"}),
        *names({role: role for role in "qkvo"} if cross else {}, f"{inner}.cross.branch.", f"{block}.1.EncDecAttention."),
        *names({f"{inner}.cross.norm": f"{block}.1.layer_norm"} if cross else {}),
        Rule((f"{inner}.ffn.branch.gate",), f"{dense}.wi_0"),
        Rule((f"{inner}.ffn.branch.up",), f"{dense}.wi_1", when=_gated),
        Rule((f"{inner}.ffn.branch.up",), f"{dense}.wi", when=_ungated),
        Rule((f"{inner}.ffn.branch.down",), f"{dense}.wo"),
        *names({f"{inner}.ffn.norm": f"{block}.{2 if cross else 1}.layer_norm"}),
    )


FAMILY = Family(
    "t5",
    _read,
    _write,
    (
        Rule(("embedding.tokens",), "shared", also=("encoder.embed_tokens", "decoder.embed_tokens")),
        *_stack("stack", "encoder", cross=False),
        *_stack("decoder", "decoder", cross=True),
        Rule(("head.weight",), "lm_head.weight"),
    ),
    lm=("T5ForConditionalGeneration",),
    base=("T5Model",),
    seq2seq=True,
    ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    defaults=(("decoder_start_token_id", 0),),
)
