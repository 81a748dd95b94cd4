"""From a description of data to splits of tensors, with everything slow kept in a cache."""

from __future__ import annotations

import dataclasses
import errno
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer
from torch import Tensor

from layerwise.data.augment import make_augment
from layerwise.data.pack import packed, padded, paired
from layerwise.data.raw import Raw, Rows, positions
from layerwise.data.sound import input_values, padded_waves
from layerwise.data.sources import check_fit, check_source, read_source, source_identity, tokenizer_file
from layerwise.data.spec import DataSpec
from layerwise.data.tokenizer import encoded, for_texts, make_tokenizer, read_tokenizer, special_ids
from layerwise.errors import BadInput
from layerwise.files import check_folder, digest, whole_folder, write_file, write_json
from layerwise.memory import check_room

__all__ = ["Data", "Split", "check_source", "load_data"]

LAYOUT = 3
"""Raised when equal sources become other arrays, so that no older cache entry is taken for a new one."""
SPLITS = ("train", "validation", "test")


@dataclass
class Split:
    """Rows of tensors.

    Attributes:
        arrays: `rows` (n, length) token ids; `lengths` (n,) of padded rows; `images` (n, c, h, w) uint8; `waves`
            (n, samples) and `mels` (n, bands, frames) of sound, `samples` (n,) of each recording in int16 waves; `labels` (n,); of pairs `starts` (n,) of the targets and `tasks` (n,).
        boundaries: the end token that separates packed documents, if rows carry segments.
        read: reads the raw texts anew.
    """

    arrays: dict[str, np.ndarray]
    boundaries: int | None = None
    read: Callable[[], list[str]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def tokens_per_row(self) -> int:
        """Tokens in a row of text; 0 for images."""
        return self.arrays["rows"].shape[1] if "rows" in self.arrays else 0

    def documents(self) -> list[str]:
        """The raw texts, read anew from the source (as it is now); none for images."""
        return [] if self.read is None else self.read()

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The rows `index` (b,) as model inputs.

        Text: `input_ids` (b, length), with `segment_ids` and `position_ids` where documents are kept apart, or
        `attention_mask` and `labels` for labelled texts. Pairs: `attention_mask`, `prompt_mask` (b, length; 1 = prompt), `labels`
        (b, length; the target's tokens, elsewhere -100) and `tasks` (b,). Images: `pixel_values` (b, c, h, w) in [0, 1] and `labels`. Sound:
        `input_values` (b, samples), of recordings with `attention_mask` (b, samples), or `input_features` (b, bands, frames).
        """
        at = index.numpy()
        made: dict[str, Tensor] = {}
        if "rows" in self.arrays:
            made["input_ids"] = torch.from_numpy(self.arrays["rows"][at].astype(np.int64))
        if "images" in self.arrays:
            made["pixel_values"] = torch.from_numpy(np.ascontiguousarray(self.arrays["images"][at])).float() / 255
        for name, called in (("waves", "input_values"), ("mels", "input_features")):
            if name in self.arrays:
                made[called] = torch.from_numpy(self.arrays[name][at])
        if "samples" in self.arrays:
            places = torch.arange(made["input_values"].shape[1])
            mask = made["attention_mask"] = (places < torch.from_numpy(self.arrays["samples"][at])[:, None]).long()
            made["input_values"] = input_values(made["input_values"], mask)
        if "lengths" in self.arrays:
            places = torch.arange(self.tokens_per_row)
            made["attention_mask"] = (places < torch.from_numpy(self.arrays["lengths"][at])[:, None]).long()
        if "starts" in self.arrays:
            prompt = torch.arange(self.tokens_per_row) < torch.from_numpy(self.arrays["starts"][at])[:, None]
            made["prompt_mask"] = prompt.long()
            made["labels"] = made["input_ids"].masked_fill(prompt | (made["attention_mask"] == 0), -100)
            made["tasks"] = torch.from_numpy(self.arrays["tasks"][at])
        if "labels" in self.arrays:
            made["labels"] = torch.from_numpy(self.arrays["labels"][at].astype(np.int64))
        if self.boundaries is not None:
            made |= segments(made["input_ids"], self.boundaries)
        return made


def segments(ids: Tensor, eos: int) -> dict[str, Tensor]:
    """Number of the document each position belongs to, and its position in it; a document ends with (and owns) its `eos`."""
    ends = torch.zeros_like(ids)
    ends[:, 1:] = (ids[:, :-1] == eos).long()
    place = torch.arange(ids.shape[1]).expand_as(ids)
    start = (place * ends).cummax(dim=1).values
    return {"segment_ids": ends.cumsum(dim=1), "position_ids": place - start}


@dataclass
class Data:
    """Prepared data.

    Attributes:
        train, validation, test: splits; `test` only where the source has one of its own.
        tokenizer, vocab: of text; special token ids where they exist.
        classes: number of classes of labelled data. channels, size: of images. rate: samples a second of sound.
        sources: name and sha256 of the content used. fingerprint: digest of all that decides the tensors.
        augment: batch -> batch for training, if the spec asks for it.
    """

    spec: DataSpec
    kind: Literal["text", "images", "sound"]
    train: Split
    validation: Split
    test: Split | None
    sources: list[dict[str, str]]
    fingerprint: str
    tokenizer: Tokenizer | None = None
    vocab: int | None = None
    classes: int | None = None
    channels: int | None = None
    size: tuple[int, int] | None = None
    rate: int | None = None
    pad_id: int | None = None
    eos_id: int | None = None
    mask_id: int | None = None
    cls_id: int | None = None
    sep_id: int | None = None
    augment: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    data_dir: Path | None = field(default=None, repr=False)

    def documents(self, split: str) -> list[str]:
        """`Split.documents` of the split of that name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}.get(split)
        if found is None:
            raise BadInput(f"{self.spec.source} has no {split} split")
        return found.documents()


def load_data(spec: DataSpec, data_dir: Path | None = None, cache_dir: Path | None = None) -> Data:
    """Read, split, tokenize and pack (or decode) a source.

    Args:
        data_dir: folder of named public sets.
        cache_dir: where prepared arrays are kept; a broken entry there is made anew. None keeps nothing.

    Raises:
        BadInput: the source cannot be read, or has too little in it for one row in every split.
    """
    check_source(spec, data_dir)
    if cache_dir is None:
        return _assembled(spec, *_prepare(spec, data_dir), data_dir)
    key = digest([LAYOUT, dataclasses.asdict(spec), source_identity(spec, data_dir), tokenizers.__version__])
    folder = cache_dir / "data" / key
    try:
        check_folder(folder)
        kept = json.loads((folder / "meta.json").read_text())
        arrays = {
            s: {n: np.load(folder / f"{s}.{n}.npy", mmap_mode="r", allow_pickle=False) for n in names}
            for s, names in kept["arrays"].items()
        }
        return _assembled(spec, kept["meta"], arrays, data_dir)
    except (BadInput, OSError, ValueError, KeyError, TypeError, AttributeError):
        meta, arrays = _prepare(spec, data_dir)
    try:
        with whole_folder(folder) as temporary:
            for split, named in arrays.items():
                for name, array in named.items():
                    np.save(temporary / f"{split}.{name}.npy", array, allow_pickle=False)
            write_json(temporary / "meta.json", {"meta": meta, "arrays": {s: list(named) for s, named in arrays.items()}})
            if meta["tokenizer"] is not None:
                write_file(temporary / "tokenizer.json", meta["tokenizer"])
    except OSError as error:
        # Nothing is lost but time; that another process put the same entry there first is no trouble at all.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            warnings.warn(f"prepared data cannot be kept in {cache_dir}: {error}", stacklevel=2)
    return _assembled(spec, meta, arrays, data_dir)


def _prepare(spec: DataSpec, data_dir: Path | None) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    raw = read_source(spec, data_dir)
    check_fit(spec, raw.kind, labelled=any(rows.labels is not None for rows in raw.splits.values()))
    splits = _split(raw, spec)
    sources = [{"name": raw.name, "sha256": raw.sha256()}]
    meta: dict[str, Any] = {
        "kind": raw.kind,
        "sources": sources,
        "tokenizer": None,
        "fingerprint": digest([LAYOUT, dataclasses.asdict(spec), sources]),
    }
    labels = [rows.labels for rows in splits.values() if rows.labels is not None]
    meta["classes"] = int(max(part.max() for part in labels if len(part))) + 1 if labels else None
    if raw.kind == "sound":
        assert raw.rate is not None
        meta["rate"] = raw.rate
        return meta, {name: _recordings(rows, spec, raw.rate, name) for name, rows in splits.items()}
    if raw.kind == "images":
        return meta, {name: _images(rows, name) for name, rows in splits.items()}
    train = [*(splits["train"].prompts or []), *(splits["train"].texts or [])]
    ready = spec.tokenizer.kind == "file"
    tokenizer = read_tokenizer(str(tokenizer_file(spec))) if ready else make_tokenizer(spec.tokenizer, train)
    if spec.boundaries and special_ids(tokenizer)["eos"] is None:
        raise BadInput(f"data.boundaries: the tokenizer {spec.tokenizer.path} has no end token to keep documents apart with")
    meta["tokenizer"] = tokenizer.to_str()
    if ready:
        # A trained tokenizer follows from the rest; a file's path does not say what is in it.
        meta["fingerprint"] = digest([meta["fingerprint"], meta["tokenizer"]])
    return meta, {name: _tokens(rows, tokenizer, spec, name, raw.name) for name, rows in splits.items()}


def _recordings(rows: Rows, spec: DataSpec, rate: int, name: str) -> dict[str, np.ndarray]:
    if not len(rows) or rows.waves is None:
        raise BadInput(f"the {name} split has no recording")
    waves, lengths = padded_waves(rows.waves, spec.seconds, rate, name)
    return {"waves": waves, "samples": lengths, **({} if rows.labels is None else {"labels": rows.labels})}


def _images(rows: Rows, name: str) -> dict[str, np.ndarray]:
    if not len(rows) or rows.images is None:
        raise BadInput(f"the {name} split has no image")
    return {"images": rows.images, **({} if rows.labels is None else {"labels": rows.labels})}


def _tokens(rows: Rows, tokenizer: Tokenizer, spec: DataSpec, split: str, source: str) -> dict[str, np.ndarray]:
    ids, special, vocab = encoded(tokenizer, rows.texts or []), special_ids(tokenizer), tokenizer.get_vocab_size()
    if rows.prompts is not None and rows.tasks is not None:
        marks = [f"{task}: " if len(spec.pairs) > 1 else "" for task in spec.pairs]
        prompts = encoded(tokenizer, [marks[task] + prompt for task, prompt in zip(rows.tasks, rows.prompts, strict=True)])
        eos, sep = special["eos"], special["sep"] if special["sep"] is not None else special["eos"]
        if eos is None or sep is None:
            raise BadInput(f"data.pairs: the tokenizer {spec.tokenizer.path} has no end token to end targets with")
        made, starts, lengths, kept = paired(prompts, ids, spec.length, special["pad"] or 0, sep, eos, vocab)
        if not len(made):
            raise BadInput(f"data.length: no prompt with its target fits into {spec.length} tokens in the {split} split of {source}")
        return {"rows": made, "lengths": lengths, "starts": starts, "tasks": rows.tasks[kept]}
    if rows.labels is not None:
        check_room(4 * len(rows) * spec.length, f"data.length: {len(rows):,} rows of {spec.length:,} tokens")
        made, lengths = padded(ids, spec.length, special["pad"] or 0, special["cls"], special["sep"], vocab)
        # A text of no tokens at all would be a row that attends to nothing, and attention over nothing is not a number.
        return {"rows": made, "lengths": np.maximum(lengths, 1), "labels": rows.labels}
    documents = list(ids)
    made = packed(documents, spec.length, special["eos"], vocab)
    if not len(made):
        tokens = sum(len(d) for d in documents)
        raise BadInput(
            f"data.source {source}: its {split} split has {tokens} tokens in {len(documents)} documents, but one row needs {spec.length}: "
            "give more text, a smaller data.length, or another data.validation"
        )
    return {"rows": made}


def _split(raw: Raw, spec: DataSpec) -> dict[str, Rows]:
    """The splits of a source: its own where it has them, else a share of the documents by their content.

    Raises:
        BadInput: a split would be empty, or fewer documents or examples exist than were asked for.
    """
    splits = {name: rows if spec.classes is None else _of_classes(rows, spec.classes, raw.name) for name, rows in raw.splits.items()}
    if "train" not in splits:
        raise BadInput(f"{raw.name} has no training split; it has {', '.join(splits)}")
    if not all(len(rows) for rows in splits.values()):
        raise BadInput(f"{raw.name} is empty: {', '.join(f'{n} has {len(r)} rows' for n, r in splits.items())}")
    train = splits["train"]
    if spec.documents is not None:
        if spec.documents > len(train):
            raise BadInput(f"data.documents asks for {spec.documents} documents; {raw.name} has {len(train)}")
        order = np.argsort(positions(train.keys(), spec.seed + 1), kind="stable")
        train = train.take(np.sort(order[: spec.documents]))
    if "validation" not in splits:
        held = _held_out(train, spec, raw.name)
        splits["validation"] = train.take(np.flatnonzero(held))
        train = train.take(np.flatnonzero(~held))
    train = train if spec.examples is None else _chosen(train, spec)
    splits["train"] = _dealt(train, spec) if spec.shares else train
    return {name: splits[name] for name in SPLITS if name in splits}


def _of_classes(rows: Rows, classes: tuple[int, ...], name: str) -> Rows:
    """The rows of some classes, which are numbered by their places among them."""
    assert rows.labels is not None
    for label in classes:
        if not (rows.labels == label).any():
            raise BadInput(f"data.classes: {name} has no row of class {label}; it has classes 0 to {int(rows.labels.max(initial=0))}")
    chosen = rows.take(np.flatnonzero(np.isin(rows.labels, classes)))
    assert chosen.labels is not None
    return dataclasses.replace(chosen, labels=np.array([classes.index(label) for label in chosen.labels], dtype=np.int64))


def _held_out(rows: Rows, spec: DataSpec, name: str) -> np.ndarray:
    """Which rows are for validation: (n,) bool. Equal rows share their place, so they are on one side (unless all are equal)."""
    place = positions(rows.keys(), spec.seed)
    places = np.unique(place)
    if len(rows) < 2:
        raise BadInput(f"{name} has {len(rows)} document, but training and validation need one each: splits are by document")
    if len(places) == 1:
        return np.arange(len(rows)) == 0
    # Of a few documents the share may be none or all: each side keeps at least one.
    return place <= np.clip(spec.validation, places[0], places[-2])


def _dealt(rows: Rows, spec: DataSpec) -> Rows:
    """The rows whose places lie in their class's share."""
    assert rows.labels is not None
    parts = np.array(
        [spec.shares.get(str(label), spec.shares.get("*", (0.0, 1.0))) for label in range(int(rows.labels.max(initial=0)) + 1)]
    )
    place = positions(rows.keys(), spec.seed + 2)
    low, high = parts[rows.labels].T
    kept = np.flatnonzero((place >= low) & (place < high))
    if not len(kept):
        raise BadInput(f"data.shares leaves no training row of {spec.source}")
    return rows.take(kept)


def _chosen(rows: Rows, spec: DataSpec) -> Rows:
    """`spec.examples` rows, of every class as many as of any other, chosen by content."""
    assert spec.examples is not None
    if spec.examples > len(rows):
        raise BadInput(f"data.examples asks for {spec.examples} training examples; there are {len(rows)}")
    order = np.argsort(positions(rows.keys(), spec.seed + 1), kind="stable")
    labels = np.zeros(len(rows), dtype=np.int64) if rows.labels is None else rows.labels[order]
    # Rank of each row within its class: taking the lowest ranks first takes the classes in turn.
    rank = np.empty(len(order), dtype=np.int64)
    for label in np.unique(labels):
        inside = np.flatnonzero(labels == label)
        rank[inside] = np.arange(len(inside))
    taken = order[np.argsort(rank, kind="stable")[: spec.examples]]
    return rows.take(np.sort(taken))


def _assembled(spec: DataSpec, meta: dict[str, Any], arrays: dict[str, dict[str, np.ndarray]], data_dir: Path | None) -> Data:
    tokenizer = None if meta["tokenizer"] is None else for_texts(Tokenizer.from_str(meta["tokenizer"]))
    special: dict[str, Any] = special_ids(tokenizer) if tokenizer is not None else {}
    boundaries = special.get("eos") if spec.boundaries else None
    splits = {name: Split(named, boundaries, _reader(spec, name, meta, data_dir)) for name, named in arrays.items()}
    data = Data(
        spec, meta["kind"], splits["train"], splits["validation"], splits.get("test"), meta["sources"], meta["fingerprint"], tokenizer,
        tokenizer.get_vocab_size() if tokenizer is not None else None, meta["classes"], data_dir=data_dir,
        **{f"{role}_id": i for role, i in special.items()},
    )  # fmt: skip
    data.rate = meta.get("rate")
    if meta["kind"] == "images":
        shape = arrays["train"]["images"].shape
        data.channels, data.size = shape[1], (shape[2], shape[3])
        if spec.augment is not None:
            data.augment = make_augment(spec.augment, data.size)
    return data


def _reader(spec: DataSpec, split: str, meta: dict[str, Any], data_dir: Path | None) -> Callable[[], list[str]] | None:
    def read() -> list[str]:
        return _split(read_source(spec, data_dir), spec)[split].texts or []

    return read if meta["kind"] == "text" else None
