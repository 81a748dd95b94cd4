"""Marian: BART with sinusoidal positions and no norm on its embedding; its head has a bias that is not trained there."""

from __future__ import annotations

import dataclasses
from typing import Any

from layerwise.models.hf import bart
from layerwise.models.hf.family import only, tokens_of
from layerwise.models.spec import ModelSpec


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    only(config, "share_encoder_decoder_embeddings", (True, None), True)
    only(config, "decoder_vocab_size", (config["vocab_size"], None), None)
    spec = bart.read(config, head)
    embedding = dataclasses.replace(tokens_of(spec), position="sinusoidal", offset=0, norm=None)
    return dataclasses.replace(spec, embedding=embedding, target=embedding)


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {**bart.write(spec), "share_encoder_decoder_embeddings": True, "decoder_vocab_size": tokens_of(spec).vocab}


FAMILY = dataclasses.replace(
    bart.FAMILY,
    name="marian",
    read=_read,
    write=_write,
    lm=("MarianMTModel",),
    base=("MarianModel",),
    carried=("model.encoder.embed_positions.", "model.decoder.embed_positions."),  # the sinusoids, which some files hold
)
