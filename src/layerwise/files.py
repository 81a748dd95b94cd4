"""Files that are whole or absent: written under a temporary name, flushed to disk, then renamed; with checksums."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerwise.errors import BadInput

CHECKSUMS = "checksums.json"
JSON_AT_MOST = 32_000_000
"""Bytes of a JSON file; as Python's lists they can take twenty times as much. The largest honest ones are indices of shards."""


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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say for which file
        raise
    _sync(path.parent)
    return path


def write_json(path: Path, value: Any) -> Path:
    """`write_file` for plain data. NaN and infinity are refused: they are not JSON."""
    return write_file(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The plain data in a JSON file.

    Raises:
        BadInput: it is larger than any honest one. OSError, ValueError, RecursionError: it cannot be read, or is not JSON.
    """
    if (size := path.stat().st_size) > JSON_AT_MOST:
        raise BadInput(f"{path} is too large: it has {size:,} bytes, at most {JSON_AT_MOST:,} are read")
    return json.loads(path.read_text())


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target`, with checksums of its files, when the block ends without an error.

    An older `target` stands until the new one takes its place, in one step where the system has one for that. What a killed
    process left unfinished beside `target` is cleared away.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    temporary, lock = _temporary(target)
    try:
        yield temporary
        listing = temporary / CHECKSUMS
        write_json(
            listing, {str(p.relative_to(temporary)): sha256(p) for p in sorted(temporary.rglob("*")) if p.is_file() and p != listing}
        )
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        _put_in_place(temporary, target)
        _sync(target.parent)
    finally:
        # Unfinished, or what stood at `target` before.
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _temporary(target: Path) -> tuple[Path, int]:
    """A new folder beside `target`, locked as long as this process lives and does not close the handle."""
    while True:
        folder = target.with_name(f".{target.name}.new-{uuid.uuid4().hex[:8]}")
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):  # without locks nobody sweeps either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)  # swept before it was locked


def _sweep(parent: Path) -> None:
    """Remove unfinished folders whose process is gone: its lock went with it."""
    for folder in parent.glob(".*.new-*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _put_in_place(temporary: Path, target: Path) -> None:
    """`temporary` under the name `target`; what stood there is under the name `temporary` afterwards, or gone."""
    if not target.exists():
        temporary.rename(target)
    elif not _exchange(temporary, target):
        aside = temporary.with_name(temporary.name.replace(".new-", ".old-"))
        target.rename(aside)
        try:
            temporary.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system (or the file system) cannot."""
    libc, names = ctypes.CDLL(None), (os.fsencode(one.absolute()), os.fsencode(other.absolute()))
    try:
        if sys.platform == "darwin":
            return libc.renamex_np(*names, 2) == 0  # RENAME_SWAP
        return libc.renameat2(-100, names[0], -100, names[1], 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:
        return False


def check_folder(folder: Path) -> None:
    """Compare every file with the checksums written beside it.

    Raises:
        BadInput: a file is missing, cut short or altered; the message names it.
    """
    listing = folder / CHECKSUMS
    try:
        expected = read_json(listing)
        if not isinstance(expected, dict) or not expected:
            raise ValueError("it names no file")
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{folder} is not a whole checkpoint: {CHECKSUMS} is missing or unreadable") from error
    for name, digest in expected.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BadInput(f"{folder} is damaged: {CHECKSUMS} names a file outside it: {name}")
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
