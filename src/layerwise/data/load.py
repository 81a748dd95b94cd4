"""From a description of data to splits of tensors, with everything slow kept in a cache."""

from __future__ import annotations

import dataclasses
import json
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
from layerwise.data.pack import packed, padded
from layerwise.data.raw import Raw, Rows, positions
from layerwise.data.sources import check_source, read_source, source_identity, tokenizer_file
from layerwise.data.spec import DataSpec
from layerwise.data.tokenizer import encoded, make_tokenizer, read_tokenizer, special_ids
from layerwise.errors import BadInput
from layerwise.files import check_folder, digest, whole_folder, write_file, write_json

__all__ = ["Data", "Split", "check_source", "load_data"]

LAYOUT = 1
SPLITS = ("train", "validation", "test")


@dataclass
class Split:
    """Rows of tensors.

    Attributes:
        arrays: `rows` (n, length) token ids; `lengths` (n,) of padded rows; `images` (n, c, h, w) uint8; `labels` (n,).
        boundaries: the end token that separates packed documents, if rows carry segments.
    """

    arrays: dict[str, np.ndarray]
    boundaries: int | None = None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def tokens_per_row(self) -> int:
        """Tokens in a row of text; 0 for images."""
        return self.arrays["rows"].shape[1] if "rows" in self.arrays else 0

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The rows `index` (b,) as model inputs.

        Text: `input_ids` (b, length), with `segment_ids` and `position_ids` where documents are kept apart, or
        `attention_mask` and `labels` for labelled texts. Images: `pixel_values` (b, c, h, w) in [0, 1] and `labels`.
        """
        at = index.numpy()
        made: dict[str, Tensor] = {}
        if "rows" in self.arrays:
            made["input_ids"] = torch.from_numpy(self.arrays["rows"][at].astype(np.int64))
        if "images" in self.arrays:
            made["pixel_values"] = torch.from_numpy(np.ascontiguousarray(self.arrays["images"][at])).float() / 255
        if "lengths" in self.arrays:
            places = torch.arange(self.tokens_per_row)
            made["attention_mask"] = (places < torch.from_numpy(self.arrays["lengths"][at])[:, None]).long()
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
        classes: number of classes of labelled data. channels, size: of images.
        sources: name and sha256 of the content used. fingerprint: digest of all that decides the tensors.
        augment: batch -> batch for training, if the spec asks for it.
    """

    spec: DataSpec
    kind: Literal["text", "images"]
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
    pad_id: int | None = None
    eos_id: int | None = None
    mask_id: int | None = None
    cls_id: int | None = None
    sep_id: int | None = None
    augment: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    data_dir: Path | None = field(default=None, repr=False)

    def documents(self, split: str) -> list[str]:
        """The raw texts of a split (read anew from the source)."""
        rows = _split(read_source(self.spec, self.data_dir), self.spec)[split]
        return rows.texts or []


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
    with whole_folder(folder) as temporary:
        for split, named in arrays.items():
            for name, array in named.items():
                np.save(temporary / f"{split}.{name}.npy", array, allow_pickle=False)
        write_json(temporary / "meta.json", {"meta": meta, "arrays": {s: list(named) for s, named in arrays.items()}})
        if meta["tokenizer"] is not None:
            write_file(temporary / "tokenizer.json", meta["tokenizer"])
    return _assembled(spec, meta, arrays, data_dir)


def _prepare(spec: DataSpec, data_dir: Path | None) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    raw = read_source(spec, data_dir)
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
    if raw.kind == "images":
        return meta, {name: _images(rows, name) for name, rows in splits.items()}
    train = splits["train"].texts or []
    ready = spec.tokenizer.kind == "file"
    tokenizer = read_tokenizer(str(tokenizer_file(spec))) if ready else make_tokenizer(spec.tokenizer, train)
    meta["tokenizer"] = tokenizer.to_str()
    if ready:
        # A trained tokenizer follows from the rest; a file's path does not say what is in it.
        meta["fingerprint"] = digest([meta["fingerprint"], meta["tokenizer"]])
    return meta, {name: _tokens(rows, tokenizer, spec, name, raw.name) for name, rows in splits.items()}


def _images(rows: Rows, name: str) -> dict[str, np.ndarray]:
    if not len(rows) or rows.images is None:
        raise BadInput(f"the {name} split has no image")
    return {"images": rows.images, **({} if rows.labels is None else {"labels": rows.labels})}


def _tokens(rows: Rows, tokenizer: Tokenizer, spec: DataSpec, split: str, source: str) -> dict[str, np.ndarray]:
    ids, special, vocab = encoded(tokenizer, rows.texts or []), special_ids(tokenizer), tokenizer.get_vocab_size()
    if rows.labels is not None:
        made, lengths = padded(ids, spec.length, special["pad"] or 0, special["cls"], special["sep"], vocab)
        return {"rows": made, "lengths": lengths, "labels": rows.labels}
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
    """The splits of a source: its own where it has them, else a share of the documents by their content."""
    splits = dict(raw.splits)
    if "train" not in splits:
        raise BadInput(f"{raw.name} has no training split; it has {', '.join(splits)}")
    if not all(len(rows) for rows in splits.values()):
        raise BadInput(f"{raw.name} is empty: {', '.join(f'{n} has {len(r)} rows' for n, r in splits.items())}")
    train = splits["train"]
    if spec.documents is not None and raw.kind == "text":
        order = np.argsort(positions(train.keys(), spec.seed + 1), kind="stable")
        train = train.take(np.sort(order[: spec.documents]))
    if "validation" not in splits:
        if len(train) < 2:
            raise BadInput(f"{raw.name} has {len(train)} document, but training and validation need one each: splits are by document")
        place = positions(train.keys(), spec.seed)
        held = place < spec.validation
        if not held.any() or held.all():
            held = place == (place.min() if not held.any() else place.max())
            held = held if not held.all() else np.arange(len(held)) == 0
            held = ~held if (place < spec.validation).all() else held
        splits["validation"] = train.take(np.flatnonzero(held))
        train = train.take(np.flatnonzero(~held))
    splits["train"] = _chosen(train, spec) if spec.examples is not None and train.labels is not None else train
    return {name: splits[name] for name in SPLITS if name in splits}


def _chosen(rows: Rows, spec: DataSpec) -> Rows:
    """`spec.examples` rows, of every class as many as of any other, chosen by content."""
    assert rows.labels is not None and spec.examples is not None
    if spec.examples > len(rows):
        raise BadInput(f"data.examples asks for {spec.examples} training examples; there are {len(rows)}")
    order = np.argsort(positions(rows.keys(), spec.seed + 1), kind="stable")
    labels = rows.labels[order]
    # Rank of each row within its class: taking the lowest ranks first takes the classes in turn.
    rank = np.empty(len(order), dtype=np.int64)
    for label in np.unique(labels):
        inside = np.flatnonzero(labels == label)
        rank[inside] = np.arange(len(inside))
    taken = order[np.argsort(rank, kind="stable")[: spec.examples]]
    return rows.take(np.sort(taken))


def _assembled(spec: DataSpec, meta: dict[str, Any], arrays: dict[str, dict[str, np.ndarray]], data_dir: Path | None) -> Data:
    tokenizer = None if meta["tokenizer"] is None else Tokenizer.from_str(meta["tokenizer"])
    special: dict[str, Any] = special_ids(tokenizer) if tokenizer is not None else {}
    boundaries = special.get("eos") if spec.boundaries else None
    splits = {name: Split(named, boundaries) for name, named in arrays.items()}
    data = Data(
        spec, meta["kind"], splits["train"], splits["validation"], splits.get("test"), meta["sources"], meta["fingerprint"], tokenizer,
        tokenizer.get_vocab_size() if tokenizer is not None else None, meta["classes"], data_dir=data_dir,
        **{f"{role}_id": i for role, i in special.items()},
    )  # fmt: skip
    if meta["kind"] == "images":
        shape = arrays["train"]["images"].shape
        data.channels, data.size = shape[1], (shape[2], shape[3])
        if spec.augment is not None:
            data.augment = make_augment(spec.augment, data.size)
    return data
