"""The families we have, by Hugging Face's `model_type`."""

from __future__ import annotations

from layerwise.errors import BadInput
from layerwise.models.hf.family import Family
from layerwise.models.spec import ModelSpec
from layerwise.table import lookup

FAMILIES = {
    "llama": "layerwise.models.hf.llama:FAMILY",
    "mistral": "layerwise.models.hf.llama:FAMILY",
    "qwen2": "layerwise.models.hf.llama:FAMILY",
    "qwen3": "layerwise.models.hf.llama:FAMILY",
}


def family_for(spec: ModelSpec) -> Family:
    """The family that can hold a model of this description.

    Raises:
        BadInput: none can; the message says what stands in the way of each.
    """
    obstacles = []
    for place in dict.fromkeys(FAMILIES.values()):
        family: Family = lookup({"family": place}, "family", "family")
        obstacle = family.obstacle(spec)
        if obstacle is None:
            return family
        obstacles.append(f"{family.name}: {obstacle}")
    raise BadInput(
        f"no Hugging Face family can hold this model ({'; '.join(obstacles)}). Save it in layerwise's own format (export: layerwise)"
    )
