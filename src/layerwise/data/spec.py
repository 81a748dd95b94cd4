"""What data a job uses and how it becomes tensors: plain data, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from layerwise.complaint import FORBID
from layerwise.errors import BadInput
from layerwise.table import unknown

COLUMNS = ("text", "image", "audio", "label")


@dataclass(frozen=True)
class TokenizerSpec:
    """How text becomes tokens.

    Attributes:
        kind: byte-level BPE or WordPiece trained on the training split, plain bytes, or a ready `file`.
        vocab: number of tokens of a trained tokenizer, specials included.
        path: for `file`: a tokenizer.json or a folder that holds one.
        lowercase: for `wordpiece`.
    """

    kind: Literal["bpe", "wordpiece", "bytes", "file"] = "bpe"
    vocab: int = 4096
    path: str | None = None
    lowercase: bool = False

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.kind == "file" and not self.path:
            raise BadInput("a tokenizer of kind file needs path: a tokenizer.json or a folder that holds one")
        if self.kind != "file" and self.path is not None:
            raise BadInput(f"tokenizer.path is for kind file; kind is {self.kind}: say kind: file to use {self.path}")
        if self.kind != "wordpiece" and self.lowercase:
            raise BadInput(f"tokenizer.lowercase is for wordpiece; kind is {self.kind}")
        if self.kind in ("bpe", "wordpiece") and self.vocab < 300:
            raise BadInput(f"a {self.kind} vocabulary holds all bytes and the specials: vocab must be at least 300; it is {self.vocab}")


@dataclass(frozen=True)
class AugmentSpec:
    """Random changes to training images (kornia).

    Attributes:
        flip: mirror left-right half the time. crop: pad by so many pixels and crop back at random.
        rotate: by up to so many degrees. color: strength of brightness, contrast and saturation jitter.
    """

    flip: bool = False
    crop: int = 0
    rotate: float = 0.0
    color: float = 0.0

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.crop < 0 or self.rotate < 0 or self.color < 0:
            raise BadInput(f"crop, rotate and color are >= 0; got {self.crop}, {self.rotate}, {self.color}")


@dataclass(frozen=True)
class DataSpec:
    """One data set, its splits and its rows.

    Attributes:
        source: `builtin:docs|code|digits|key-values|lines|needle` ..., `path:FILE_OR_FOLDER`, `hub:NAME[:CONFIG]`, or a named set in the data folder.
        columns: canonical name (text, image, audio, label) -> the source's column (`{text: body}`).
        pairs: task -> columns of its prompt and its target (`{translate: [en, de]}`): each row of the table is a row for each task, its
            loss is on the target alone, and with several tasks the prompt begins with the task's name. Rows longer than `length` are left out.
        tokenizer: for text. length: tokens in a row.
        validation: share of the documents (or images) held out where the source has no validation split of its own.
        classes: use the rows of these classes only, numbered anew in this order (None: all).
        shares: class -> which part of its training rows to use, `*` for classes that are not named: `{"9": [0, 1], "*": [0, 0.1]}` and
            `{"9": [0, 0], "*": [0.1, 1]}` deal one set out to two networks. Rows have their places in [0, 1) by their content.
        documents: use so many documents only. examples: use so many training images only, classes evenly.
        boundaries: packed rows carry `segment_ids` and positions that restart with every document.
        augment: random changes to training images.
        seconds: recordings are cut behind so many (None: the longest is what there is room for).
        seed: of the split and the selection (not of the order of training, which follows the run's seed).
    """

    source: str = "builtin:docs"
    columns: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    length: int = 128
    validation: float = 0.1
    classes: tuple[int, ...] | None = None
    shares: dict[str, tuple[float, float]] = field(default_factory=dict)
    documents: int | None = None
    examples: int | None = None
    boundaries: bool = False
    augment: AugmentSpec | None = None
    seconds: float | None = None
    seed: int = 0

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.length < 2:
            raise BadInput(f"length must be at least 2 tokens; it is {self.length}")
        if not 0 < self.validation < 1:
            raise BadInput(f"validation is the share held out, between 0 and 1; it is {self.validation}")
        for name in self.columns:
            if name not in COLUMNS:
                raise unknown(name, COLUMNS, "canonical column in data.columns:")
        for key, (low, high) in self.shares.items():
            if not (key == "*" or key.isdecimal()) or not 0 <= low <= high <= 1:
                raise BadInput(f"shares gives a part [low, high] of [0, 1] for a class number or *; got {key}: [{low}, {high}]")
        if self.pairs and self.columns:
            raise BadInput("data.pairs names the columns of prompts and targets: leave data.columns out")
        if self.seconds is not None and self.seconds <= 0:
            raise BadInput(f"seconds must be above 0; it is {self.seconds}")
        if self.classes is not None and (len(self.classes) < 2 or len(set(self.classes)) < len(self.classes) or min(self.classes) < 0):
            raise BadInput(f"classes are at least two different class numbers; got {list(self.classes)}")
        for name in ("documents", "examples"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise BadInput(f"{name} must be at least 2; it is {value}")
