"""DistilBERT: BERT without token types, under names of its own."""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import TokenSpec
from layerwise.models.hf.bert import OLD_NAMES
from layerwise.models.hf.family import Family, Rule, names, read_activation, stack_of, tokens_of, write_activation
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

EPS = 1e-12
"""Fixed in their code."""


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    activation, dropout = read_activation(config, "activation", "gelu"), config.get("dropout", 0.1)
    layer = LayerSpec(
        heads=config["n_heads"],
        ffn=activation,
        ffn_width=config["hidden_dim"],
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        norm="layernorm",
        norm_eps=EPS,
        placement="post",
        dropout=dropout,
        attention_dropout=config.get("attention_dropout", 0.1),
    )
    tie = bool(config.get("tie_word_embeddings", True))
    return ModelSpec(
        embedding=TokenSpec(
            vocab=config["vocab_size"],
            position="learned",
            max_length=config.get("max_position_embeddings", 512),
            norm="layernorm",
            norm_eps=EPS,
            dropout=dropout,
        ),
        stack=StackSpec(
            depth=config["n_layers"], width=config["dim"], layer=layer, final_norm=False, init_std=config.get("initializer_range", 0.02)
        ),
        head=HeadSpec(tie=tie, bias=True, transform=activation, norm="layernorm", norm_eps=EPS) if head else None,
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    stack, tokens = stack_of(spec), tokens_of(spec)
    layer = stack.layers[0]
    return {
        "vocab_size": tokens.vocab,
        "dim": stack.width,
        "n_layers": stack.depth,
        "n_heads": layer.heads,
        "hidden_dim": layer.ffn_width,
        "activation": write_activation(layer.ffn),
        "dropout": layer.dropout,
        "attention_dropout": layer.attention_dropout,
        "max_position_embeddings": tokens.max_length,
        "initializer_range": stack.init_std,
        "tie_word_embeddings": spec.head is None or spec.head.tie,
    }


FAMILY = Family(
    "distilbert",
    _read,
    _write,
    (
        *names(
            {
                "embedding.tokens": "embeddings.word_embeddings",
                "embedding.positions": "embeddings.position_embeddings",
                "embedding.norm": "embeddings.LayerNorm",
            },
            theirs="distilbert.",
        ),
        *names(
            {
                **{f"mixer.branch.{role}": f"attention.{role}_lin" for role in "qkv"},
                "mixer.branch.o": "attention.out_lin",
                "mixer.norm": "sa_layer_norm",
                "ffn.branch.up": "ffn.lin1",
                "ffn.branch.down": "ffn.lin2",
                "ffn.norm": "output_layer_norm",
            },
            "stack.layers.*.",
            "distilbert.transformer.layer.*.",
        ),
        Rule(("head.dense",), "vocab_transform"),
        Rule(("head.norm",), "vocab_layer_norm"),
        Rule(("head.weight",), "vocab_projector.weight"),
        Rule(("head.bias",), "vocab_projector.bias"),
    ),
    lm=("DistilBertForMaskedLM",),
    base=("DistilBertModel",),
    prefix="distilbert.",
    renamed=OLD_NAMES,
    ignored=("embeddings.position_ids",),
)
