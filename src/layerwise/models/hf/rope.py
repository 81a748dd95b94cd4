"""Rotary positions in a Hugging Face config: `rope_parameters`, and the older `rope_theta` and `rope_scaling`."""

from __future__ import annotations

from typing import Any

from layerwise.errors import BadInput
from layerwise.stack.parts_spec import RopeScaling
from layerwise.stack.spec import LayerSpec


def read_rope(config: dict[str, Any], head_dim: int, *, share: float = 1.0) -> dict[str, Any]:
    """The fields of `LayerSpec` that say how heads are rotated.

    Args:
        share: of a head's dimensions that are rotated, where the config does not say.

    Raises:
        BadInput: a kind of scaling that we do not have.
    """
    # transformers lets an old rope_scaling, where there is one, stand before rope_parameters.
    found = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = found.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base") or 10000.0
    share = found.get("partial_rotary_factor") or config.get("partial_rotary_factor") or config.get("rotary_pct") or share
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind not in ("default", "linear", "llama3") or any(isinstance(value, dict) for value in found.values()):
        raise BadInput(f"config.json: rotary scaling {found} is not known here; layerwise can do default, linear and llama3")
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", float(found["factor"]))
    elif kind == "llama3":
        original = found.get("original_max_position_embeddings") or config["max_position_embeddings"]
        factor, low, high = (float(found[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        scaling = RopeScaling("llama3", factor, low, high, original)
    turned = int(head_dim * share)
    return {"rope_theta": float(theta), "rope_scaling": scaling, "rotary_dim": None if turned == head_dim else turned}


def write_rope(layer: LayerSpec) -> dict[str, Any]:
    """The config keys for a layer's rotary positions, in the present form and, for older readers, in the former one."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": layer.rope_theta}
    scaling = layer.rope_scaling
    if scaling is not None:
        found |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            found |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
            found["original_max_position_embeddings"] = scaling.original
    if layer.rotary_dim is not None and layer.head_dim:
        found["partial_rotary_factor"] = layer.rotary_dim / layer.head_dim
    return {"rope_parameters": found, "rope_theta": layer.rope_theta, **({"rope_scaling": found} if scaling is not None else {})}
