"""RoBERTa: BERT whose positions are counted from behind the padding token's number."""

from __future__ import annotations

from typing import Any

from layerwise.errors import BadInput
from layerwise.models.hf.bert import OLD_NAMES, bias_rules, encoder_rules, masked_head, read_encoder, write_encoder
from layerwise.models.hf.family import Family, Rule, tokens_of
from layerwise.models.spec import ModelSpec


def read(config: dict[str, Any], head: bool) -> ModelSpec:
    """Position p is row p + pad + 1 of the table; padding has the row of its own number."""
    offset = config.get("pad_token_id", 1) + 1
    if offset < 1:
        raise BadInput(f"config.json: pad_token_id is {offset - 1}; positions are counted from it, so it is at least 0")
    rows = config.get("max_position_embeddings", 512)
    # The head's activation is fixed in their code, whatever the layers have.
    return read_encoder(config, masked_head(config, "gelu") if head else None, offset=offset, max_length=rows - offset)


def write(spec: ModelSpec) -> dict[str, Any]:
    """`read` backwards."""
    return {**write_encoder(spec), "pad_token_id": max(tokens_of(spec).offset - 1, 0)}


RULES = (
    *encoder_rules("roberta."),
    Rule(("head.dense",), "lm_head.dense"),
    Rule(("head.norm",), "lm_head.layer_norm"),
    Rule(("head.weight",), "lm_head.decoder.weight"),
    *bias_rules("lm_head.bias", "lm_head.decoder.bias"),
)
FAMILY = Family(
    "roberta",
    read,
    write,
    RULES,
    lm=("RobertaForMaskedLM",),
    base=("RobertaModel",),
    prefix="roberta.",
    renamed=OLD_NAMES,
    ignored=("embeddings.position_ids",),
    carried=("roberta.pooler.",),
)
