"""ELECTRA: BERT with smaller vectors for tokens, projected to the width of the layers.

The discriminator is read without its head (one score a token), which is carried along.
"""

from __future__ import annotations

from typing import Any

from layerwise.models.hf.bert import OLD_NAMES, encoder_rules, masked_head, read_encoder, write_encoder
from layerwise.models.hf.family import Family, Rule, stack_of, tokens_of
from layerwise.models.spec import ModelSpec


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    size = config.get("embedding_size", 128)
    projected = None if size == config["hidden_size"] else size
    # The head's activation is fixed in their code, whatever the layers have. It always makes vectors of the embedding's size.
    return read_encoder(config, masked_head(config, "gelu", size=projected) if head else None, size=projected)


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {**write_encoder(spec), "embedding_size": tokens_of(spec).size or stack_of(spec).width}


FAMILY = Family(
    "electra",
    _read,
    _write,
    (
        *encoder_rules("electra."),
        Rule(("embedding.project",), "electra.embeddings_project"),
        Rule(("head.dense",), "generator_predictions.dense"),
        Rule(("head.norm",), "generator_predictions.LayerNorm"),
        Rule(("head.weight",), "generator_lm_head.weight"),
        Rule(("head.bias",), "generator_lm_head.bias"),
    ),
    lm=("ElectraForMaskedLM",),
    base=("ElectraModel", "ElectraForPreTraining"),
    prefix="electra.",
    renamed=OLD_NAMES,
    ignored=("embeddings.position_ids",),
    carried=("discriminator_predictions.",),
)
