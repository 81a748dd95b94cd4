"""mT5: T5 for many languages, gated where its config does not say otherwise; what its head reads is never scaled.

transformers ties its head always; a checkpoint whose head is another matrix keeps it here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from layerwise.models.hf import t5
from layerwise.models.spec import ModelSpec


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    return t5.FAMILY.read({"feed_forward_proj": "gated-gelu"} | config | {"scale_decoder_outputs": False}, head)


def _write(spec: ModelSpec) -> dict[str, Any]:
    return {key: value for key, value in t5.FAMILY.write(spec).items() if key != "scale_decoder_outputs"}


FAMILY = dataclasses.replace(t5.FAMILY, name="mt5", read=_read, write=_write, lm=("MT5ForConditionalGeneration",), base=("MT5Model",))
