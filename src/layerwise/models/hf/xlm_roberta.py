"""XLM-RoBERTa: RoBERTa for many languages, under a name of its own."""

from __future__ import annotations

import dataclasses

from layerwise.models.hf import roberta

FAMILY = dataclasses.replace(roberta.FAMILY, name="xlm-roberta", lm=("XLMRobertaForMaskedLM",), base=("XLMRobertaModel",))
