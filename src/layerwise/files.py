"""Files that are whole or absent: written under a temporary name, flushed to disk, then renamed; with checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerwise.errors import BadInput

CHECKSUMS = "checksums.json"


def write_file(path: Path, content: bytes | str) -> Path:
    """Write a file so that a crash leaves the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)
    return path


def write_json(path: Path, value: Any) -> Path:
    """`write_file` for plain data. NaN and infinity are refused: they are not JSON."""
    return write_file(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target`, with checksums of its files, when the block ends without an error.

    An older `target` is moved aside and removed only once the new one stands.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    temporary = target.with_name(f".{target.name}.new-{mark}")
    temporary.mkdir()
    try:
        yield temporary
        listing = temporary / CHECKSUMS
        write_json(
            listing, {str(p.relative_to(temporary)): sha256(p) for p in sorted(temporary.rglob("*")) if p.is_file() and p != listing}
        )
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        aside = target.with_name(f".{target.name}.old-{mark}")
        if target.exists():
            target.rename(aside)
        try:
            temporary.rename(target)
        except BaseException:
            if aside.exists():
                aside.rename(target)
            raise
        _sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_folder(folder: Path) -> None:
    """Compare every file with the checksums written beside it.

    Raises:
        BadInput: a file is missing, cut short or altered; the message names it.
    """
    listing = folder / CHECKSUMS
    try:
        expected = json.loads(listing.read_text())
        if not isinstance(expected, dict) or not expected:
            raise ValueError("it names no file")
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} is not a whole checkpoint: {CHECKSUMS} is missing or unreadable") from error
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            raise BadInput(f"{folder} is damaged: {name} is missing")
        if sha256(path) != digest:
            raise BadInput(f"{folder} is damaged: the content of {name} does not match its checksum (cut short or altered)")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hexadecimal SHA-256 of plain data, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
