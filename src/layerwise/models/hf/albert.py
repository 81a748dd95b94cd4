"""ALBERT: BERT whose layers share their weights, one set for each group of them, over factorized token vectors.

Source: Lan et al. 2020, "ALBERT", sections 3.1 (factorization, sharing) and 3.2 (sizes).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from layerwise.models.hf.bert import EMBEDDING, bias_rules, masked_head, read_encoder, write_encoder
from layerwise.models.hf.family import Family, Rule, names, only, read_activation, stack_of, tokens_of
from layerwise.models.spec import ModelSpec

LAYER = {
    "mixer.branch.q": "attention.query",
    "mixer.branch.k": "attention.key",
    "mixer.branch.v": "attention.value",
    "mixer.branch.o": "attention.dense",
    "mixer.norm": "attention.LayerNorm",
    "ffn.branch.up": "ffn",
    "ffn.branch.down": "ffn_output",
    "ffn.norm": "full_layer_layer_norm",
}
DEFAULTS: dict[str, Any] = {"hidden_act": "gelu_new", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""Where ALBERT's differ from BERT's."""


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    only(config, "inner_group_num", (1,), 1)
    config = DEFAULTS | config
    size = config.get("embedding_size", 128)
    lm = masked_head(config, read_activation(config, "hidden_act", "gelu_new"), size=size) if head else None
    spec = read_encoder(config, lm, size=size)
    groups = _groups(config["num_hidden_layers"], config.get("num_hidden_groups", 1))
    shared = tuple(groups.index(g) for g in groups) if len(set(groups)) < len(groups) else ()
    return dataclasses.replace(spec, stack=dataclasses.replace(stack_of(spec), shared=shared))


def _groups(depth: int, groups: int) -> list[int]:
    """The group whose weights each layer has, in transformers' own arithmetic."""
    return [int(i / (depth / groups)) for i in range(depth)]


def _write(spec: ModelSpec) -> dict[str, Any]:
    groups = len(set(_firsts(spec)))
    return {
        **write_encoder(spec),
        "embedding_size": tokens_of(spec).size or stack_of(spec).width,
        "num_hidden_groups": groups,
        "inner_group_num": 1,
    }


def _firsts(spec: ModelSpec) -> tuple[int, ...]:
    stack = stack_of(spec)
    return stack.shared or tuple(range(stack.depth))


def _place(spec: ModelSpec) -> list[str]:
    firsts = _firsts(spec)
    order = sorted(set(firsts))
    return [str(order.index(first)) for first in firsts]


FAMILY = Family(
    "albert",
    _read,
    _write,
    (
        *names(EMBEDDING, theirs="albert."),
        *names({"embedding.project": "encoder.embedding_hidden_mapping_in"}, theirs="albert."),
        *names(LAYER, "stack.layers.*.", "albert.encoder.albert_layer_groups.*.albert_layers.0."),
        Rule(("head.dense",), "predictions.dense"),
        Rule(("head.norm",), "predictions.LayerNorm"),
        Rule(("head.weight",), "predictions.decoder.weight"),
        *bias_rules("predictions.bias", "predictions.decoder.bias"),
    ),
    lm=("AlbertForMaskedLM", "AlbertForPreTraining"),
    base=("AlbertModel",),
    prefix="albert.",
    ignored=("embeddings.position_ids",),
    carried=("albert.pooler.", "sop_classifier."),
    place=_place,
)
