"""The families we have, by Hugging Face's `model_type`."""

from __future__ import annotations

from layerwise.errors import BadInput
from layerwise.models.hf.family import Family
from layerwise.models.hf.fit import differences, unreadable
from layerwise.models.spec import ModelSpec
from layerwise.table import lookup

FAMILIES = {
    "llama": "layerwise.models.hf.llama:FAMILY",
    "mistral": "layerwise.models.hf.mistral:FAMILY",
    "ministral": "layerwise.models.hf.ministral:FAMILY",
    "qwen2": "layerwise.models.hf.qwen2:FAMILY",
    "qwen3": "layerwise.models.hf.qwen3:FAMILY",
    "gemma": "layerwise.models.hf.gemma:FAMILY",
    "gpt2": "layerwise.models.hf.gpt2:FAMILY",
    "gpt_neox": "layerwise.models.hf.gpt_neox:FAMILY",
    "opt": "layerwise.models.hf.opt:FAMILY",
    "bert": "layerwise.models.hf.bert:FAMILY",
    "roberta": "layerwise.models.hf.roberta:FAMILY",
    "xlm-roberta": "layerwise.models.hf.xlm_roberta:FAMILY",
    "distilbert": "layerwise.models.hf.distilbert:FAMILY",
    "electra": "layerwise.models.hf.electra:FAMILY",
    "albert": "layerwise.models.hf.albert:FAMILY",
    "t5": "layerwise.models.hf.t5:FAMILY",
    "mt5": "layerwise.models.hf.mt5:FAMILY",
    "bart": "layerwise.models.hf.bart:FAMILY",
    "marian": "layerwise.models.hf.marian:FAMILY",
    "vit": "layerwise.models.hf.vit:FAMILY",
    "deit": "layerwise.models.hf.deit:FAMILY",
    "dinov2": "layerwise.models.hf.dinov2:FAMILY",
    "dinov2_with_registers": "layerwise.models.hf.dinov2_with_registers:FAMILY",
    "beit": "layerwise.models.hf.beit:FAMILY",
    "resnet": "layerwise.models.hf.resnet:FAMILY",
    "bit": "layerwise.models.hf.bit:FAMILY",
    "clip_text_model": "layerwise.models.hf.clip_text_model:FAMILY",
    "clip_vision_model": "layerwise.models.hf.clip_vision_model:FAMILY",
    "clip": "layerwise.models.hf.clip:FAMILY",
    "wav2vec2": "layerwise.models.hf.wav2vec2:FAMILY",
    "hubert": "layerwise.models.hf.hubert:FAMILY",
    "whisper": "layerwise.models.hf.whisper:FAMILY",
}
"""In the order in which they are tried when a model is written: where two could hold it, the first does."""


def family_for(spec: ModelSpec, preferred: str | None = None) -> Family:
    """The family that can hold a model of this description.

    Args:
        preferred: the `model_type` to take if it can hold the model.

    Raises:
        BadInput: none can; the message says what stands in the way of the nearest one.
    """
    reason = unreadable(spec)
    nearest: list[str] = []
    for name in () if reason else sorted(FAMILIES, key=lambda n: n != preferred):
        family: Family = lookup(FAMILIES, name, "family")
        found = differences(family, spec)
        if not found:
            return family
        if not nearest or len(found) < len(nearest):
            nearest = found
    raise BadInput(
        f"no Hugging Face family can hold this model: {reason or nearest[0]}. Save it in layerwise's own format (export: layerwise). "
        f"Families: {', '.join(FAMILIES)}"
    )
