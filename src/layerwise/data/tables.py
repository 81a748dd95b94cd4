"""Tables to rows: through `datasets`' builders, with canonical columns."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from layerwise.data.images import decoded
from layerwise.data.raw import Raw, Rows
from layerwise.data.sound import recordings
from layerwise.data.spec import DataSpec
from layerwise.errors import BadInput


def read_tables(builder: str, name: str, spec: DataSpec, **options: Any) -> Raw:
    """Local files, through the `datasets` builder of that name, in memory: nothing is left on the disk.

    Args:
        name: of the source, for messages.
        options: of `datasets.load_dataset`: `data_files` or `data_dir`, and what the builder knows.

    Raises:
        BadInput: the files cannot be parsed, or `from_tables` refuses what is in them.
    """
    import datasets

    with tempfile.TemporaryDirectory(prefix="layerwise-") as scratch, _quiet():
        try:
            tables = datasets.load_dataset(builder, cache_dir=scratch, **options)
        except Exception as error:  # the builders raise whatever their parsers do
            raise BadInput(f"{name} cannot be read as {builder}: {reason(error)}") from error
        return from_tables(name, tables, spec)


def from_tables(name: str, tables: Mapping[str, Any], spec: DataSpec) -> Raw:
    """Splits of a `datasets.DatasetDict`; columns are canonical or named by the spec.

    Raises:
        BadInput: a column is missing, or holds what it cannot.
    """
    if spec.pairs:
        return Raw("text", name, {split: paired(_named(table, name, spec), spec) for split, table in tables.items()})
    columns = {canonical: spec.columns.get(canonical, canonical) for canonical in ("text", "image", "audio", "label")}
    kinds = {split: _kind(table.column_names, columns, spec, name) for split, table in tables.items()}
    kind: Any = next(iter(kinds.values()))
    if len(set(kinds.values())) > 1:
        raise BadInput(f"{name} has splits of different kinds: {', '.join(f'{s} is {k}' for s, k in kinds.items())}")
    labels = _labels({s: list(t[columns["label"]]) for s, t in tables.items() if columns["label"] in t.column_names}, name)
    if labels and (bare := [s for s in tables if s not in labels]):
        raise BadInput(f"{name}: its {bare[0]} split has no column '{columns['label']}', the others do")
    splits, rates = {}, {}
    for split, table in tables.items():
        if kind == "sound":
            waves, rates[split] = recordings(_encoded(table, columns["audio"]), name)
            splits[split] = Rows(waves=waves, labels=labels.get(split))
        elif kind == "images":
            splits[split] = Rows(images=decoded(_encoded(table, columns["image"]), name), labels=labels.get(split))
        else:
            splits[split] = _texts(table[columns["text"]], labels.get(split))
    if len(set(rates.values())) > 1:
        raise BadInput(f"{name}: its splits have different sampling rates: {', '.join(f'{s} {r}' for s, r in rates.items())}")
    return Raw(kind, name, splits, next(iter(rates.values()), None))


def reason(error: BaseException) -> str:
    """What a library's error says, in a line; its builders wrap the parser's error, which says more, in their own."""
    said = str(error.__cause__ or error).strip() or type(error).__name__
    return said.splitlines()[0][:300]


def _kind(have: list[str], columns: dict[str, str], spec: DataSpec, name: str) -> str:
    for canonical, column in spec.columns.items():
        if column not in have:
            raise BadInput(f"data.columns.{canonical}: {name} has no column '{column}'; it has {', '.join(have)}")
    # A set with several is read as what the spec names; else as images, recordings or texts.
    named = [c for c in ("image", "audio", "text") if c in spec.columns] or ["image", "audio", "text"]
    for canonical in named:
        if columns[canonical] in have:
            return {"image": "images", "audio": "sound", "text": "text"}[canonical]
    example = next(iter(have), "body")
    raise BadInput(
        f"{name} has neither a text nor an image nor an audio column but {', '.join(have)}: name it with data.columns, e.g. {{text: {example}}}"
    )


def _texts(values: Iterable[Any], labels: np.ndarray | None) -> Rows:
    """Texts; a missing one is empty, and empty ones are dropped unless a label belongs to them."""
    texts = ["" if value is None else str(value) for value in values]
    return Rows(texts=texts if labels is not None else [text for text in texts if text.strip()], labels=labels)


def _named(table: Any, name: str, spec: DataSpec) -> dict[str, list[str]]:
    """The columns that `spec.pairs` names, as texts."""
    columns: dict[str, list[str]] = {}
    for column in {column for pair in spec.pairs.values() for column in pair}:
        if column not in table.column_names:
            raise BadInput(f"data.pairs: {name} has no column '{column}'; it has {', '.join(table.column_names)}")
        columns[column] = ["" if value is None else str(value) for value in table[column]]
    return columns


def paired(columns: dict[str, list[str]], spec: DataSpec) -> Rows:
    """A row for each task of each row of a table, in its order; those with an empty prompt or target are dropped."""
    found = [
        (columns[prompt][i], columns[target][i], task)
        for i in range(len(next(iter(columns.values()))))
        for task, (prompt, target) in enumerate(spec.pairs.values())
        if columns[prompt][i].strip() and columns[target][i].strip()
    ]
    prompts, texts, tasks = zip(*found, strict=True) if found else ((), (), ())
    return Rows(texts=list(texts), prompts=list(prompts), tasks=np.array(tasks, dtype=np.int64))


def _labels(splits: dict[str, list[Any]], name: str) -> dict[str, np.ndarray]:
    """Class numbers. Names are numbered in the order of the alphabet, over all splits together so that a number means one class."""
    everything = [value for values in splits.values() for value in values]
    if everything and all(isinstance(value, str) for value in everything):
        numbers = {value: i for i, value in enumerate(sorted(set(everything)))}
        splits = {split: [numbers[value] for value in values] for split, values in splits.items()}
    elif wrong := [value for value in everything if not isinstance(value, int) or isinstance(value, bool) or value < 0]:
        raise BadInput(f"{name}: labels are class numbers from 0 on or class names; found {wrong[0]!r}")
    return {split: np.array(values, dtype=np.int64) for split, values in splits.items()}


def _encoded(table: Any, column: str) -> Any:
    import datasets

    for kind in (datasets.Image, datasets.Audio):
        if isinstance(table.features[column], kind):
            table = table.cast_column(column, kind(decode=False))
    return table[column]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars for files that are read in a moment."""
    import datasets

    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()
