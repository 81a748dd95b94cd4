"""Which files a folder's data is in, of what kind they are, and which split each belongs to."""

from __future__ import annotations

import re
from pathlib import Path

from layerwise.errors import BadInput

SUFFIXES = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}
"""First bytes of what `datasets` would unpack."""
_TAR_AT = 257
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def kind_of(path: Path) -> str:
    """`text`, `image`, or the name of the `datasets` builder that reads the file."""
    return SUFFIXES.get(path.suffix.lower(), "image")


def data_files(path: Path) -> list[Path]:
    """The data files at a path, sorted; all of one kind.

    In a folder, tables come before everything (their columns say what is what), except that a table named metadata belongs to
    the images beside it. Pictures among texts, and notes among pictures, are left out: the kind there is more of counts.

    Raises:
        BadInput: there is nothing, nothing of a known kind, or nothing but empty files.
    """
    if not path.exists():
        raise BadInput(f"data.source: there is no file or folder {path}")
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise BadInput(
                f"data.source: {path.name} is of a kind layerwise does not read; it reads {', '.join(sorted(SUFFIXES))} and image folders"
            )
        found = [path]
    else:
        found = _in_folder(path)
        if not found:
            raise BadInput(f"data.source: no data files in {path}; layerwise reads {', '.join(sorted(SUFFIXES))} and image folders")
    if all(p.stat().st_size == 0 for p in found):
        raise BadInput(f"data.source: {path} is empty")
    return found


def refuse_archives(path: Path, files: list[Path]) -> None:
    """Refuse compressed files and archives, whatever they are called: the library that reads tables would unpack them.

    Args:
        path: of the source. files: its data files. A folder of pictures is handed over whole, so what is beside them is looked at.

    Raises:
        BadInput: one is an archive; the message says of which kind.
    """
    if kind_of(files[0]) == "image":
        files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() not in IMAGES and p.is_file()]
    for file in files:
        with file.open("rb") as opened:
            start = opened.read(_TAR_AT + 5)
        found = next((kind for magic, kind in _ARCHIVES.items() if start.startswith(magic)), None)
        found = "tar" if start[_TAR_AT:] == b"ustar" else found
        if found is not None:
            raise BadInput(f"data.source: {file} is an archive or a compressed file ({found}); unpack it first, where you trust it")


def _in_folder(folder: Path) -> list[Path]:
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in (*SUFFIXES, *IMAGES)
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        and p.is_file()
    )
    pictures = [p for p in files if kind_of(p) == "image"]
    tables = [p for p in files if kind_of(p) not in ("image", "text") and not (pictures and p.stem == "metadata")]
    if tables:
        return [p for p in tables if p.suffix.lower() == tables[0].suffix.lower()]
    # A README.md beside texts describes them; a folder of nothing but .md files is a corpus.
    texts = [p for p in files if p.suffix.lower() == ".txt"] or [p for p in files if p.suffix.lower() == ".md"]
    return pictures if len(pictures) >= len(texts) else texts


def descriptions(path: Path) -> list[Path]:
    """The tables named metadata in a folder of images, which say more about them."""
    return sorted(p for p in path.rglob("metadata.*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else []


def split_of(path: Path) -> str | None:
    """The split a file is named for (`test.csv`, `sst2_dev.tsv`, `train-00000-of-00004.parquet`), or None.

    Only a whole word at either end counts: `development.txt` and `value.csv` are not splits.
    """
    words = [word for word in re.split(r"[^a-z]+", path.stem.lower()) if word]
    for split, names in _SPLITS.items():
        if words and (words[0] in names or words[-1] in names):
            return split
    return None


def splits_of(files: list[Path], *, documents: bool) -> dict[str, list[Path]]:
    """Files by split; what is named for no split is for training.

    Args:
        documents: each file is a document with a name of its own, so names are splits only where one of them is `train`.

    Raises:
        BadInput: there are only files named for validation and test.
    """
    named = {path: split_of(path) for path in files}
    if documents and "train" not in named.values() and None in named.values():
        return {"train": files}
    found: dict[str, list[Path]] = {}
    for path in files:
        found.setdefault(named[path] or "train", []).append(path)
    if "train" not in found:
        raise BadInput(
            f"data.source: {files[0].parent} has no training split; it has {', '.join(found)}: name a file train{files[0].suffix}, "
            "or give the file itself as path:FILE"
        )
    return found
