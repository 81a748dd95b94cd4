"""The config.json of an export: what the model decides, over what its old config said about everything else."""

from __future__ import annotations

import dataclasses
from typing import Any

from layerwise.errors import BadInput
from layerwise.models.hf.family import Family
from layerwise.models.origin import Origin
from layerwise.models.spec import ModelSpec
from layerwise.stack.spec import StackSpec

NEVER = ("auto_map", "transformers_version", "_name_or_path", "torch_dtype", "dtype")
"""Keys of an old config that are not taken over: code to run, and what is written anew."""
FORMER = ("rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base", "type_vocab_size", "position_embedding_type")
"""Keys that may contradict what is written once the model has changed."""
SPECIAL = {
    "pad": ("<pad>", "[PAD]", "<|padding|>"),
    "bos": ("<bos>", "<s>", "[BOS]"),
    "eos": ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "[EOS]"),
    "unk": ("<unk>", "[UNK]"),
    "mask": ("<mask>", "[MASK]"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
}
"""Usual names of special tokens, by Hugging Face's role names."""


def merged_config(family: Family, spec: ModelSpec, origin: Origin | None, architecture: str, max_length: int | None) -> dict[str, Any]:
    """The config of a model of this description.

    Args:
        origin: what it came from, if that was of the same family. A config that describes the model as it is now is taken over
            as it was, letter for letter; after a change only the keys remain that the family does not write.
    """
    written = family.write(spec)
    labels = written.pop("num_labels", None)
    config: dict[str, Any] = {"model_type": family.name, "architectures": [architecture]}
    if origin is None:
        config |= {**dict(family.defaults), **written, **_labels(labels, {})}
    else:
        old = {key: value for key, value in origin.config.items() if key not in NEVER}
        if _reads_as(family, old, spec):
            config = {**old, **config}
        else:
            same_tokens = old.get("vocab_size") == written.get("vocab_size")
            stale = {k for k in old if k in FORMER or (k.endswith("_token_id") and not same_tokens)}
            config = {**{k: v for k, v in old.items() if k not in stale}, **_nested(written, old), **_labels(labels, old), **config}
    if isinstance(spec, ModelSpec) and isinstance(spec.stack, StackSpec) and any(layer.position == "rotary" for layer in spec.stack.layers):
        config["max_position_embeddings"] = max(config.get("max_position_embeddings") or 0, max_length or 0) or 2048
    return config


def _nested(written: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """What is written, where a part of a config (a tower's) keeps the old keys that are not."""
    return {k: {**old[k], **v} if isinstance(v, dict) and isinstance(old.get(k), dict) else v for k, v in written.items()}


def _labels(count: int | None, old: dict[str, Any]) -> dict[str, Any]:
    """The names of a classifier's classes: the old ones where there are as many."""
    if count is None or len(old.get("id2label") or ()) == count:
        return {}
    return {"id2label": {str(i): f"LABEL_{i}" for i in range(count)}, "label2id": {f"LABEL_{i}": i for i in range(count)}}


def special_tokens(tokenizer: Any, config: dict[str, Any]) -> dict[str, str]:
    """The tokenizer's special tokens by role: those that the config numbers, else those with a usual name."""
    found = {}
    for role, usual in SPECIAL.items():
        number = config.get(f"{role}_token_id")
        name = tokenizer.id_to_token(number) if isinstance(number, int) and number >= 0 else None
        name = name or next((n for n in usual if tokenizer.token_to_id(n) is not None), None)
        if name is not None:
            found[role] = name
    return found


def _reads_as(family: Family, config: dict[str, Any], spec: ModelSpec) -> bool:
    if isinstance(spec, ModelSpec):
        spec = dataclasses.replace(spec, pool="mean")  # a config says nothing of it
    try:
        return family.read(config, spec.head is not None) == spec
    except (BadInput, KeyError, TypeError, AttributeError, ValueError):
        return False
