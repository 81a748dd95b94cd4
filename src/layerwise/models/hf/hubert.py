"""HuBERT: wav2vec 2.0's network, whose projection of frames may have no norm."""

from __future__ import annotations

from typing import Any

from layerwise.embed.audio_spec import WaveSpec
from layerwise.models.hf.family import Family
from layerwise.models.hf.wav2vec2 import OLD_NAMES, read_sound, sound_rules, wave_of, write_sound
from layerwise.models.spec import ModelSpec


def _read(config: dict[str, Any], head: bool) -> ModelSpec:
    return read_sound(config, head, "Hubert", project_norm=bool(config.get("feat_proj_layer_norm", True)))


def _write(spec: ModelSpec) -> dict[str, Any]:
    written = {**write_sound(spec, "Hubert"), "feat_proj_layer_norm": wave_of(spec).project_norm, "conv_pos_batch_norm": False}
    return {k: v for k, v in written.items() if not k.startswith("add_adapter") and k != "adapter_attn_dim"}


FAMILY = Family(
    "hubert",
    _read,
    _write,
    sound_rules("hubert."),
    classifier=("HubertForCTC", "HubertForSequenceClassification"),
    base=("HubertModel",),
    prefix="hubert.",
    reads=WaveSpec,
    renamed=OLD_NAMES,
)
