"""Small files that stand beside a checkpoint and tell other libraries how to use it: kept as they were."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from layerwise.files import write_file

SIDECARS = (
    "preprocessor_config.json",  # transformers: images and audio
    "processor_config.json",
    "modules.json",  # sentence-transformers: what comes after the network
    "1_Pooling/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
BYTES_AT_MOST = 1_000_000


def read_sidecars(folder: Path) -> dict[str, str]:
    """Name -> text of those that are there; one that is not JSON, is a link or is large is left behind."""
    found = {}
    for name in SIDECARS:
        path = folder / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size > BYTES_AT_MOST:
            continue
        try:
            text = path.read_text()
            json.loads(text)
        except (OSError, ValueError, RecursionError):
            continue
        found[name] = text
    return found


def write_sidecars(folder: Path, sidecars: Mapping[str, str]) -> None:
    """Put them beside an exported checkpoint; names that are not in `SIDECARS` are not written."""
    for name in SIDECARS:
        if name in sidecars:
            write_file(folder / name, sidecars[name])
