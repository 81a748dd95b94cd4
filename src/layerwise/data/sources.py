"""Reading a source: built-in corpora, files, named public sets in a folder, the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerwise.data.builtin import BUILTIN, KINDS, LABELLED, RECALL, TABLES, identity
from layerwise.data.paths import data_files, descriptions, kind_of, refuse_archives, splits_of
from layerwise.data.raw import Raw, Rows
from layerwise.data.spec import DataSpec
from layerwise.data.tables import from_tables, paired, read_tables, reason
from layerwise.errors import BadInput
from layerwise.table import lookup, nearest

DOCUMENT_CHARACTERS = 3000
TEXTS = 4096
"""Texts of a made-up corpus, where `data.documents` does not say how many."""


def check_source(spec: DataSpec, data_dir: Path | None = None) -> None:
    """Whether a source can be read, without reading it.

    Raises:
        BadInput: an unknown built-in corpus or named set, a file or folder that is missing, empty or of an unknown kind, a
            tokenizer file that is missing, an archive, an option that means nothing for this source.
    """
    kind, name = _kind(spec.source)
    if kind == "builtin":
        lookup(dict.fromkeys([*BUILTIN, *RECALL], "layerwise.data.raw:Raw"), name, "built-in corpus")
        if name not in TABLES:
            _refuse_columns(spec)
        elif not spec.pairs or not {column for pair in spec.pairs.values() for column in pair} <= set(TABLES[name]):
            raise BadInput(
                f"data.pairs: {spec.source} has prompts and targets in its columns {' and '.join(TABLES[name])}: say which is which"
            )
        check_fit(spec, KINDS[name], labelled=name in LABELLED)
    elif kind != "hub":
        folder = _folder(kind, name, data_dir)
        files = data_files(folder)
        refuse_archives(folder, files)
        if kind_of(files[0]) == "text":
            _splits(folder, files)
            _refuse_columns(spec)
            check_fit(spec, "text", labelled=False)
        elif kind_of(files[0]) == "image":
            check_fit(spec, "images", labelled=True)
        else:
            _splits(folder, files)
    if spec.tokenizer.kind == "file":
        tokenizer_file(spec)


def check_fit(spec: DataSpec, kind: str, *, labelled: bool) -> None:
    """Whether the options of a spec mean something for data of a kind (`text`, `images` or `sound`, with labels or without).

    Raises:
        BadInput: one would have no effect; better said than ignored.
    """
    what = kind if kind != "text" else "texts with labels" if labelled else "pairs" if spec.pairs else "text without labels"
    if spec.boundaries and what != "text without labels":
        raise BadInput(f"data.boundaries keeps packed documents apart; {spec.source} has {what}, one a row")
    if spec.shares and not labelled:
        raise BadInput(f"data.shares chooses rows by their labels; {spec.source} has {what}")
    if spec.classes is not None and not labelled:
        raise BadInput(f"data.classes chooses rows by their labels; {spec.source} has {what}")
    if spec.augment is not None and kind != "images":
        raise BadInput(f"data.augment changes images; {spec.source} has {what}")
    if spec.documents is not None and kind != "text":
        raise BadInput(f"data.documents counts texts; {spec.source} has {kind}: use data.examples")
    if spec.seconds is not None and kind != "sound":
        raise BadInput(f"data.seconds cuts recordings; {spec.source} has {what}")
    if spec.examples is not None and what in ("text without labels", "pairs"):
        raise BadInput(f"data.examples counts images or texts with labels; {spec.source} has {what}: use data.documents")


def _refuse_columns(spec: DataSpec) -> None:
    if spec.columns or spec.pairs:
        raise BadInput(
            f"data.{'columns' if spec.columns else 'pairs'}: {spec.source} has no columns to name; tables (jsonl, csv, parquet, hub:) have"
        )


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
    files = [tokenizer_file(spec)] if spec.tokenizer.kind == "file" else []
    if kind == "builtin":
        where: list[Any] = [identity()]
    elif kind == "hub":
        where = [name]
    else:
        where = []
        folder = _folder(kind, name, data_dir)
        files += [*data_files(folder), *descriptions(folder)]
    return [where, [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in files]]


def read_source(spec: DataSpec, data_dir: Path | None = None) -> Raw:
    """Read a source whole.

    Raises:
        BadInput: as `check_source`, and for columns that are not there or files that cannot be decoded.
    """
    kind, name = _kind(spec.source)
    if kind == "builtin":
        check_source(spec, data_dir)
        if name in RECALL:
            return lookup(RECALL, name, "built-in corpus")(spec.length, spec.documents or TEXTS, spec.seed)
        made = lookup(BUILTIN, name, "built-in corpus")()
        return Raw("text", spec.source, {"train": paired(made, spec)}) if name in TABLES else made
    if kind == "hub":
        return from_tables(spec.source, _hub(name), spec)
    folder = _folder(kind, name, data_dir)
    files = data_files(folder)
    refuse_archives(folder, files)
    if kind_of(files[0]) == "text":
        return _texts(spec.source, _splits(folder, files))
    if kind_of(files[0]) == "image":
        # In folders named for their classes, perhaps below train/, validation/ and test/, or with a metadata.csv.
        return read_tables("imagefolder", spec.source, spec, data_dir=str(folder))
    options = {"sep": "\t"} if files[0].suffix.lower() == ".tsv" else {}
    splits = {split: [str(path) for path in paths] for split, paths in _splits(folder, files).items()}
    return read_tables(kind_of(files[0]), spec.source, spec, data_files=splits, **options)


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


def _folder(kind: str, name: str, data_dir: Path | None) -> Path:
    """Where the files of a `path:` source or a named set lie."""
    if kind == "named":
        return _named(name, data_dir)
    return Path.home() / name[2:] if name.startswith("~/") else Path(name)


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


def _splits(source: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Files by split; a file that the source names itself is for training, whatever its name."""
    return {"train": files} if source.is_file() else splits_of(files, documents=kind_of(files[0]) == "text")


def _texts(name: str, files: dict[str, list[Path]]) -> Raw:
    """Text files: each a document, but the files of a set of one to three are cut at blank lines into documents of a few KB."""
    splits, whole = {}, sum(map(len, files.values())) > 3
    for split, paths in files.items():
        documents: list[str] = []
        for path in paths:
            try:
                content = path.read_text(encoding="utf-8-sig")
            except UnicodeDecodeError as error:
                raise BadInput(f"data.source: {path} is not UTF-8 text: {error}") from error
            documents += [content] if whole else _cut(content)
        splits[split] = Rows(texts=[d for d in documents if d.strip()])
    return Raw("text", name, splits)


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
    """A dataset of the Hub, or the copy an earlier download left when there is no network."""
    import datasets

    repository, _, config = name.partition(":")
    try:
        with _offline(not _reachable(repository)):
            return datasets.load_dataset(repository, config or None)
    except Exception as error:  # network, missing repository, gated repository
        raise BadInput(
            f"hub:{name} could not be loaded ({type(error).__name__}: {reason(error)}). "
            "It needs a network; or download it once and use path:FOLDER"
        ) from error


def _reachable(repository: str) -> bool:
    """Whether the Hub answers at all, found out at once: the libraries would try again for half a minute."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(repository, timeout=10)
    except Exception as error:  # by name: the Hub's client has changed its HTTP library before
        return not {"ConnectError", "ConnectionError", "OfflineModeIsEnabled"}.intersection(c.__name__ for c in type(error).__mro__)
    return True


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Only what is already on this machine, as with HF_HUB_OFFLINE=1, which the libraries read when they are imported."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before[0] or wanted, before[1] or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
