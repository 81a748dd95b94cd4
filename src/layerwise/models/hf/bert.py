"""BERT: post-norm layers over normalized token, position and type vectors; a tied vocabulary head with a transform.

Its relatives start from what is here.
"""

from __future__ import annotations

from typing import Any

from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.models.hf.family import Family, Rule, is_tied, is_untied, names, only, read_activation, stack_of, tokens_of, write_activation
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

LAYERS = {
    "mixer.branch.q": "attention.self.query",
    "mixer.branch.k": "attention.self.key",
    "mixer.branch.v": "attention.self.value",
    "mixer.branch.o": "attention.output.dense",
    "mixer.norm": "attention.output.LayerNorm",
    "ffn.branch.up": "intermediate.dense",
    "ffn.branch.down": "output.dense",
    "ffn.norm": "output.LayerNorm",
}
EMBEDDING = {
    "embedding.tokens": "embeddings.word_embeddings",
    "embedding.positions": "embeddings.position_embeddings",
    "embedding.types": "embeddings.token_type_embeddings",
    "embedding.norm": "embeddings.LayerNorm",
}
OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


def encoder_rules(prefix: str) -> tuple[Rule, ...]:
    """The names of everything below the head, for the families that are built like BERT."""
    return (*names(EMBEDDING, theirs=prefix), *names(LAYERS, "stack.layers.*.", f"{prefix}encoder.layer.*."))


def bias_rules(own: str, decoder: str) -> tuple[Rule, ...]:
    """The head's bias has two names. Tied heads have one tensor under both; in others the decoder's is used, and the other never is."""
    return Rule(("head.bias",), own, also=(decoder,), when=is_tied), Rule(("head.bias",), decoder, unused=(own,), when=is_untied)


def read_encoder(config: dict[str, Any], head: HeadSpec | None, **embedding: Any) -> ModelSpec:
    """Their config to our description; `embedding` holds what the member of the family has otherwise."""
    only(config, "is_decoder", (False, None), False)
    only(config, "add_cross_attention", (False, None), False)
    only(config, "position_embedding_type", ("absolute", None), "absolute")
    if config.get("type_vocab_size", 2) < 1:
        raise BadInput("config.json: type_vocab_size is 0; it is at least 1")
    eps, dropout = config.get("layer_norm_eps", 1e-12), config.get("hidden_dropout_prob", 0.1)
    fields: dict[str, Any] = {
        "vocab": config["vocab_size"],
        "position": "learned",
        "max_length": config.get("max_position_embeddings", 512),
        "types": config.get("type_vocab_size", 2),
        "norm": "layernorm",
        "norm_eps": eps,
        "dropout": dropout,
    }
    layer = LayerSpec(
        heads=config["num_attention_heads"],
        ffn=read_activation(config, "hidden_act", "gelu"),
        ffn_width=config["intermediate_size"],
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        norm="layernorm",
        norm_eps=eps,
        placement="post",
        dropout=dropout,
        attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
    )
    return ModelSpec(
        embedding=TokenSpec(**fields | embedding),
        stack=StackSpec(
            depth=config["num_hidden_layers"],
            width=config["hidden_size"],
            layer=layer,
            final_norm=False,
            init_std=config.get("initializer_range", 0.02),
        ),
        head=head,
    )


def write_encoder(spec: ModelSpec) -> dict[str, Any]:
    """Our description to the config keys that the whole family has."""
    stack, tokens = stack_of(spec), tokens_of(spec)
    layer = stack.layers[0]
    return {
        "vocab_size": tokens.vocab,
        "hidden_size": stack.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": layer.heads,
        "intermediate_size": layer.ffn_width,
        "hidden_act": write_activation(layer.ffn),
        "hidden_dropout_prob": layer.dropout,
        "attention_probs_dropout_prob": layer.attention_dropout,
        "max_position_embeddings": tokens.max_length + tokens.offset,
        "type_vocab_size": max(tokens.types, 1),
        "layer_norm_eps": layer.norm_eps,
        "initializer_range": stack.init_std,
        "tie_word_embeddings": spec.head is None or spec.head.tie,
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    }


def masked_head(config: dict[str, Any], transform: Any, **other: Any) -> HeadSpec:
    """The vocabulary head that the family has: dense, activation, norm, the tied matrix and a bias."""
    tie = bool(config.get("tie_word_embeddings", True))
    return HeadSpec(tie=tie, bias=True, transform=transform, norm="layernorm", norm_eps=config.get("layer_norm_eps", 1e-12), **other)


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    return read_encoder(config, masked_head(config, read_activation(config, "hidden_act", "gelu")) if head else None)


FAMILY = Family(
    "bert",
    _read,
    write_encoder,
    (
        *encoder_rules("bert."),
        Rule(("head.dense",), "cls.predictions.transform.dense"),
        Rule(("head.norm",), "cls.predictions.transform.LayerNorm"),
        Rule(("head.weight",), "cls.predictions.decoder.weight"),
        *bias_rules("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ),
    lm=("BertForMaskedLM", "BertForPreTraining"),
    base=("BertModel",),
    prefix="bert.",
    renamed=OLD_NAMES,
    ignored=("embeddings.position_ids",),
    carried=("bert.pooler.", "cls.seq_relationship."),
)
