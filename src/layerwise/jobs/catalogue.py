"""The systems that come with the package, and their receipts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from layerwise.errors import BadInput
from layerwise.table import unknown

SYSTEMS = Path(__file__).resolve().parents[1] / "systems"


def names() -> list[str]:
    """Names of all systems."""
    return sorted(p.stem for p in SYSTEMS.glob("*.yaml"))


def find(name_or_file: str) -> Path:
    """The job file of a system, or the file itself.

    Raises:
        BadInput: neither; the nearest system's name is given.
    """
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml") or "/" in name_or_file:
        if not path.is_file():
            raise BadInput(f"there is no file {name_or_file}")
        return path
    if name_or_file not in names():
        raise unknown(name_or_file, names(), "system")
    return SYSTEMS / f"{name_or_file}.yaml"


def receipts_folder() -> Path | None:
    """Where committed receipts lie: `LAYERWISE_RECEIPTS`, or `receipts/` of the source tree; None for an installed package."""
    chosen = os.environ.get("LAYERWISE_RECEIPTS")
    folder = Path(chosen) if chosen else Path(__file__).resolve().parents[3] / "receipts"
    return folder if folder.is_dir() else None


def receipt_data(name: str, scale: str) -> dict[str, Any] | None:
    """The committed receipt of a system at a scale as plain data, or None."""
    folder = receipts_folder()
    path = folder / scale / f"{name}.json" if folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from error


def listing() -> list[dict[str, Any]]:
    """One entry a system: name, card, title, family, kinds and the verdicts of its receipts. Reads headers only: fast."""
    entries = []
    for name in names():
        job = yaml.load((SYSTEMS / f"{name}.yaml").read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        verdicts = {scale: (receipt_data(name, scale) or {}).get("verdict") for scale in ("tiny", "mini", "small", "full")}
        entries.append(
            {
                "name": name,
                "card": job.get("card"),
                "title": job.get("title") or (job.get("paper") or {}).get("title", ""),
                "family": job.get("family"),
                "kinds": job.get("kinds", []),
                "receipts": {scale: verdict for scale, verdict in verdicts.items() if scale == "small" or verdict},
            }
        )
    return entries
