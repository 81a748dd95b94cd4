"""Results of stages kept by what they came from, so that a base model is trained once and shared by many jobs."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layerwise.errors import BadInput
from layerwise.files import check_folder, digest, sha256, whole_folder, write_json

UNRELATED = ("report", "systems", "cli.py")
"""Rooms whose code does not change what a stage computes."""


def cache_folder() -> Path | None:
    """Where results are kept: `LAYERWISE_CACHE` (`off`: nowhere), else the user's cache folder."""
    chosen = os.environ.get("LAYERWISE_CACHE")
    if chosen == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(chosen) if chosen else (Path(base) if base else Path.home() / ".cache") / "layerwise"


@functools.cache
def code_version() -> str:
    """Digest of the source that decides what stages compute."""
    root = Path(__file__).resolve().parents[1]
    files = [p for p in sorted(root.rglob("*.py")) if p.relative_to(root).parts[0] not in UNRELATED]
    return digest({str(p.relative_to(root)): sha256(p) for p in files})


@dataclass
class Result:
    """What a stage left.

    Attributes:
        findings: plain data of `Findings`. seconds, peak_bytes: what it cost when it ran.
        before, after: layers, parameters and bytes of the model around an edit; removed: layers it took out.
        curve: the lines it added to metrics.jsonl. model: folder of the model it made, if it made one.
    """

    findings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0
    before: dict[str, int] | None = None
    after: dict[str, int] | None = None
    removed: list[int] | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    model: Path | None = None

    def data(self) -> dict[str, Any]:
        """Plain data that `of` reads back."""
        return {**asdict(self), "model": str(self.model) if self.model is not None else None}

    @classmethod
    def of(cls, data: dict[str, Any]) -> Result:
        return cls(**{**data, "model": Path(data["model"]) if data["model"] is not None else None})


class StageCache:
    """A folder of results, one folder a key; a broken one is as good as absent.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / "stages"

    def find(self, key: str, say: Callable[[str], None] = lambda message: None) -> Result | None:
        """The result kept under `key`, or None; a damaged one is named to `say`."""
        folder = self.root / key
        if not folder.is_dir():
            return None
        try:
            check_folder(folder)
            kept = json.loads((folder / "result.json").read_text())
            model = folder / "model"
            return Result(**kept, model=model if model.is_dir() else None)
        except (BadInput, OSError, ValueError, TypeError, AttributeError) as error:
            say(f"{error}; made anew")
            return None

    @contextmanager
    def keep(self, key: str, result: Result) -> Iterator[Path]:
        """Keep `result`; the block may save a model into `<yielded folder>/model`."""
        with whole_folder(self.root / key) as folder:
            yield folder
            kept = asdict(result)
            kept.pop("model")
            write_json(folder / "result.json", kept)
        model = self.root / key / "model"
        result.model = model if model.is_dir() else None
