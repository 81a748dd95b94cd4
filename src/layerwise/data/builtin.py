"""Corpora that are always there: CPython's documentation and library, its functions with their summaries, digits, and texts made up to be asked about."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from layerwise.data.raw import Raw, Rows

BUILTIN = {
    "docs": "layerwise.data.builtin:docs",
    "code": "layerwise.data.builtin:code",
    "docs-or-code": "layerwise.data.builtin:docs_or_code",
    "docs+code": "layerwise.data.builtin:mixture",
    "digits": "layerwise.data.builtin:digits",
    "tones": "layerwise.data.builtin:voices",
    "summaries": "layerwise.data.builtin:summaries",
}
RECALL = {
    "key-values": "layerwise.data.recall:key_values",
    "lines": "layerwise.data.recall:lines",
    "needle": "layerwise.data.recall:needle",
}
"""Texts of a length, a number and a seed, those of the data's description: `(length, texts, seed) -> Raw`."""
KINDS = {
    "docs": "text",
    "code": "text",
    "docs-or-code": "text",
    "docs+code": "text",
    "digits": "images",
    "tones": "sound",
    "summaries": "text",
    **dict.fromkeys(RECALL, "text"),
}
LABELLED = ("docs-or-code", "digits", "tones")
MAKERS = (Path(__file__), Path(__file__).with_name("recall.py"))
TABLES = {"summaries": ("signature", "summary")}
"""Corpora that are tables, and their columns, for `data.pairs`; they are given as columns and not as `Raw`."""

_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
    "ensurepip",
    "turtledemo",
    "config",
}


def identity() -> str:
    """What decides the content of the built-in corpora: this interpreter, its libraries, and the modules that make them."""
    makers = hashlib.sha256(b"".join(path.read_bytes() for path in MAKERS)).hexdigest()
    # Importing scikit-learn for its version would take longer than a cached load does.
    return f"{sys.version} {importlib.metadata.version('scikit-learn')} {makers}"


def docs() -> Raw:
    """English: CPython's documentation topics, and the docstrings of its library, one document a module."""
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    for path in _library():
        found = "\n\n".join(_docstrings(path))
        if found:
            documents.append(found)
    return Raw("text", "builtin:docs", {"train": Rows(texts=[_clean(d) for d in documents])})


def code() -> Raw:
    """Python: the library's source files, one document a file."""
    documents = [path.read_text(encoding="utf-8", errors="replace") for path in _library()]
    return Raw("text", "builtin:code", {"train": Rows(texts=[_clean(d) for d in documents if d.strip()])})


def docs_or_code() -> Raw:
    """Lines of English (label 0) and of Python (1) of at least 30 characters, every tenth of both: a small labelled set of texts."""
    parts = [[line.strip() for text in made().splits["train"].texts or [] for line in text.split("\n")] for made in (docs, code)]
    lines = [sorted({line for line in part if len(line) >= 30})[::10] for part in parts]
    labels = np.repeat(np.arange(2, dtype=np.int64), [len(part) for part in lines])
    return Raw("text", "builtin:docs-or-code", {"train": Rows(texts=lines[0] + lines[1], labels=labels)})


def mixture() -> Raw:
    """The documents of `docs`, and as many characters of `code`; a document is in the same split as there."""
    english = docs().splits["train"].texts or []
    python = code().splits["train"].texts or []
    room, chosen = sum(map(len, english)), []
    for document in sorted(python, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if room <= 0:
            break
        chosen.append(document)
        room -= len(document)
    return Raw("text", "builtin:docs+code", {"train": Rows(texts=[*english, *chosen])})


def digits() -> Raw:
    """1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998, through scikit-learn); a tenth is the test split."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = np.round(loaded.images / 16 * 255).astype(np.uint8)[:, None]
    labels = loaded.target.astype(np.int64)
    # Which images are the test split follows from the images themselves, as in every split here.
    test = np.array([hashlib.sha256(image.tobytes()).digest()[0] < 26 for image in images])
    return Raw(
        "images",
        "builtin:digits",
        {"train": Rows(images=images[~test], labels=labels[~test]), "test": Rows(images=images[test], labels=labels[test])},
    )


def summaries() -> dict[str, list[str]]:
    """Signatures of the functions of CPython's library, and the first lines of their docstrings."""
    made: dict[str, list[str]] = {"signature": [], "summary": []}
    for path in _library():
        for node in _nodes(path):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                made["signature"].append(f"{node.name}({ast.unparse(node.args)})")
                made["summary"].append(text.split("\n")[0].strip())
    return made


def voices() -> Raw:
    """240 synthesized voices of half a second at 8 kHz; the label says whether a pitch falls (0), hardly moves (1) or rises (2)."""
    from layerwise.data.tones import glide, tones

    made, labels = tones(240, samples=4000, rate=8000), np.asarray(glide(240))
    waves = [row.astype(np.int16) for row in np.round(np.asarray(made.clamp(-8, 8)) * 4000)]
    return Raw("sound", "builtin:tones", {"train": Rows(waves=waves, labels=labels)}, 8000)


def _library() -> Iterator[Path]:
    """The standard library's source files, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if not _SKIPPED.intersection(parts) and not any(p.startswith("config-") for p in parts):
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    for node in _nodes(path):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _nodes(path: Path) -> Iterator[ast.AST]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    yield from ast.walk(tree)


def _clean(text: str) -> str:
    """Unix line ends, no trailing blanks."""
    return "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")).strip("\n") + "\n"
