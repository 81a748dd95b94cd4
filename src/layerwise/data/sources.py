"""Reading a source: built-in corpora, files, named public sets in a folder, the Hugging Face Hub."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np

from layerwise.data.builtin import BUILTIN, identity
from layerwise.data.raw import Raw, Rows
from layerwise.data.spec import DataSpec
from layerwise.errors import BadInput
from layerwise.table import lookup, nearest

SUFFIXES = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
DOCUMENT_CHARACTERS = 3000


def check_source(spec: DataSpec, data_dir: Path | None = None) -> None:
    """Whether a source can be read, without reading it.

    Raises:
        BadInput: an unknown built-in corpus or named set, a file or folder that is missing, empty or of an unknown kind, a
            tokenizer file that is missing.
    """
    kind, name = _kind(spec.source)
    if kind == "builtin":
        lookup(dict.fromkeys(BUILTIN, "layerwise.data.raw:Raw"), name, "built-in corpus")
    elif kind == "path":
        _files(Path(name))
    elif kind == "named":
        _files(_named(name, data_dir))
    if spec.tokenizer.kind == "file":
        tokenizer_file(spec)


def tokenizer_file(spec: DataSpec) -> Path:
    """The tokenizer.json that a spec names."""
    path = Path(str(spec.tokenizer.path))
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise BadInput(f"data.tokenizer.path: there is no tokenizer file {path}")
    return path


def source_identity(spec: DataSpec, data_dir: Path | None) -> Any:
    """What tells a changed source from an unchanged one without reading it: names, sizes, times."""
    kind, name = _kind(spec.source)
    tokenizer = [tokenizer_file(spec)] if spec.tokenizer.kind == "file" else []
    if kind == "builtin":
        where: list[Any] = [identity()]
    elif kind == "hub":
        where = [name]
    else:
        where = []
        tokenizer += _files(Path(name) if kind == "path" else _named(name, data_dir))
    return [where, [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in tokenizer]]


def read_source(spec: DataSpec, data_dir: Path | None = None) -> Raw:
    """Read a source whole.

    Raises:
        BadInput: as `check_source`, and for columns that are not there or files that cannot be decoded.
    """
    kind, name = _kind(spec.source)
    if kind == "builtin":
        check_source(spec, data_dir)
        return lookup(BUILTIN, name, "built-in corpus")()
    if kind == "hub":
        return _from_tables(spec.source, _hub(name), spec)
    folder = Path(name) if kind == "path" else _named(name, data_dir)
    files = _files(folder)
    kinds = {SUFFIXES.get(p.suffix.lower(), "image") for p in files}
    if kinds == {"text"}:
        return _texts(spec.source, files)
    if kinds == {"image"}:
        return _image_folder(spec.source, folder, files)
    splits: dict[str, list[str]] = {}
    for path in files:
        splits.setdefault(_split_of(path), []).append(str(path))
    import datasets

    builder = SUFFIXES[files[0].suffix.lower()]
    options = {"sep": "\t"} if files[0].suffix.lower() == ".tsv" else {}
    try:
        tables = datasets.load_dataset(builder, data_files=splits, **options)
    except Exception as error:  # the builders raise whatever their parsers do
        raise BadInput(f"{spec.source} cannot be read as {builder}: {str(error).splitlines()[0]}") from error
    return _from_tables(spec.source, tables, spec)


def _kind(source: str) -> tuple[str, str]:
    head, colon, rest = source.partition(":")
    if colon and head in ("builtin", "path", "hub"):
        if not rest:
            raise BadInput(f"data.source '{source}' names nothing after '{head}:'")
        return head, rest
    if colon:
        raise BadInput(
            f"data.source '{source}': '{head}' is not a kind of source.{nearest(head, ('builtin', 'path', 'hub'))} Known: builtin:, path:, hub:"
        )
    return "named", source


def _named(name: str, data_dir: Path | None) -> Path:
    """The folder of a named public set."""
    if not name or Path(name).name != name or name in (".", ".."):
        raise BadInput(f"data.source '{name}' is not a set's name; for files write path:{name}")
    if data_dir is None:
        raise BadInput(
            f"'{name}' is a public set that layerwise does not bring along: say where it lies with --data-dir (it looks for DIR/{name}/)"
        )
    if not (data_dir / name).is_dir():
        have = [p.name for p in data_dir.iterdir() if p.is_dir()] if data_dir.is_dir() else []
        hint = nearest(name, have)
        raise BadInput(
            f"there is no set '{name}' in {data_dir}.{hint} Put its files (train.parquet, train.txt, ...) into {data_dir / name}/"
        )
    return data_dir / name


def _files(path: Path) -> list[Path]:
    """The data files at a path, sorted; all of one kind."""
    if not path.exists():
        raise BadInput(f"data.source: there is no file or folder {path}")
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise BadInput(
                f"data.source: {path.name} is of a kind layerwise does not read; it reads {', '.join(sorted(SUFFIXES))} and image folders"
            )
        found = [path]
    else:
        found = sorted(
            p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in (*SUFFIXES, *IMAGES) and not p.name.startswith(".")
        )
        tables = [p for p in found if SUFFIXES.get(p.suffix.lower()) in ("parquet", "csv", "json")]
        texts = [p for p in found if SUFFIXES.get(p.suffix.lower()) == "text" and p.suffix != ".md"]
        pictures = [p for p in found if p.suffix.lower() in IMAGES]
        found = [p for p in tables if p.suffix == tables[0].suffix] if tables else pictures or texts or found
        if not found:
            raise BadInput(f"data.source: no data files in {path}; layerwise reads {', '.join(sorted(SUFFIXES))} and image folders")
    if all(p.stat().st_size == 0 for p in found):
        raise BadInput(f"data.source: {path} is empty")
    return found


def _split_of(path: Path) -> str:
    words = re.findall("[a-z]+", path.stem.lower()) or [""]
    for split, names in {"validation": ("validation", "valid", "val", "dev"), "test": ("test",)}.items():
        if words[0] in names or words[-1] in names:
            return split
    return "train"


def _texts(name: str, files: list[Path]) -> Raw:
    """Text files: each a document, but a single long file is cut at blank lines into documents of a few thousand characters."""
    try:
        contents = [(path, path.read_text(encoding="utf-8")) for path in files]
    except UnicodeDecodeError as error:
        raise BadInput(f"data.source: {name} is not UTF-8 text: {error}") from error
    splits: dict[str, list[str]] = {}
    for path, content in contents:
        documents = [content] if len(files) > 3 else _cut(content)
        splits.setdefault(_split_of(path), []).extend(d for d in documents if d.strip())
    if "train" not in splits and splits:
        splits = {"train": [d for documents in splits.values() for d in documents]}
    return Raw("text", name, {split: Rows(texts=documents) for split, documents in splits.items()})


def _cut(text: str) -> list[str]:
    documents: list[str] = []
    part: list[str] = []
    size = 0
    blocks = text.split("\n\n") if "\n\n" in text else text.split("\n")
    glue = "\n\n" if "\n\n" in text else "\n"
    for block in blocks:
        part.append(block)
        size += len(block)
        if size >= DOCUMENT_CHARACTERS:
            documents.append(glue.join(part))
            part, size = [], 0
    return [*documents, glue.join(part)] if part else documents


def _hub(name: str) -> Any:
    import datasets

    repository, _, config = name.partition(":")
    try:
        return datasets.load_dataset(repository, config or None)
    except Exception as error:  # network, missing repository, gated repository
        raise BadInput(
            f"hub:{name} could not be loaded ({type(error).__name__}: {str(error).splitlines()[0][:200]}). "
            "It needs a network; or download it once and use path:FOLDER"
        ) from error


def _from_tables(name: str, tables: Any, spec: DataSpec) -> Raw:
    """Splits of a `datasets.DatasetDict` with canonical columns."""
    splits: dict[str, Rows] = {}
    kind: Any = None
    columns = {c: spec.columns.get(c, c) for c in ("text", "image", "label")}
    numbered = _labels({s: list(t[columns["label"]]) for s, t in tables.items() if columns["label"] in t.column_names}, name)
    for split, table in tables.items():
        have = table.column_names
        for canonical, column in spec.columns.items():
            if column not in have:
                raise BadInput(f"data.columns.{canonical}: {name} has no column '{column}'; it has {', '.join(have)}")
        labels = numbered.get(split)
        if columns["image"] in have:
            kind = "images"
            splits[split] = Rows(images=_decoded(table, columns["image"], name), labels=labels)
        elif columns["text"] in have:
            kind = "text"
            splits[split] = Rows(texts=[str(t) for t in table[columns["text"]]], labels=labels)
        else:
            raise BadInput(
                f"{name} has neither a text nor an image column but {', '.join(have)}: name it with data.columns, e.g. {{text: {have[0]}}}"
            )
    return Raw(kind, name, splits)


def _labels(splits: dict[str, list[Any]], name: str) -> dict[str, np.ndarray]:
    """Class numbers of every split; a class name has the same number in all of them."""
    values = [v for part in splits.values() for v in part]
    if all(isinstance(v, str) for v in values):
        order = {v: i for i, v in enumerate(sorted(set(values)))}
        splits = {split: [order[v] for v in part] for split, part in splits.items()}
    elif wrong := [v for v in values if not isinstance(v, int) or isinstance(v, bool) or v < 0]:
        raise BadInput(f"{name}: labels are class numbers from 0 on or class names; found {wrong[0]!r}")
    return {split: np.array(part, dtype=np.int64) for split, part in splits.items()}


def _decoded(table: Any, column: str, name: str) -> np.ndarray:
    """All images of a column as one (n, c, h, w) uint8 array."""
    import datasets
    from PIL import Image, UnidentifiedImageError

    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    arrays = []
    for value in table[column]:
        try:
            with Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]) as image:
                arrays.append(np.asarray(image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")))
        except (OSError, UnidentifiedImageError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{name}: image {len(arrays)} cannot be decoded: {error}") from error
    shapes = {a.shape for a in arrays}
    if len(shapes) > 1:
        raise BadInput(
            f"{name}: images have {len(shapes)} different sizes ({sorted(shapes)[0]}, {sorted(shapes)[1]}, ...); resize them to one first"
        )
    stacked = np.stack(arrays)
    return stacked[:, None] if stacked.ndim == 3 else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))


def _image_folder(name: str, folder: Path, files: list[Path]) -> Raw:
    """Images in folders named for their classes (optionally below train/, validation/, test/), by `datasets`' builder."""
    import datasets

    tables = datasets.load_dataset("imagefolder", data_dir=str(folder))
    return _from_tables(name, tables, DataSpec())
