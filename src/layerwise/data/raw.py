"""A source as it was read: texts, prompts with targets, images or recordings, with labels or without, before splitting and tokenizing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass
class Rows:
    """Documents, images or recordings of one split.

    Attributes:
        texts: documents, or targets where there are prompts. images: (n, c, h, w) uint8. labels: (n,) class numbers, if there are any.
        prompts: what stands before each text. tasks: (n,) number of each prompt's task, in the order of `DataSpec.pairs`.
        waves: recordings, each (samples,) int16.
    """

    texts: list[str] | None = None
    images: np.ndarray | None = None
    labels: np.ndarray | None = None
    prompts: list[str] | None = None
    tasks: np.ndarray | None = None
    waves: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return next((len(rows) for rows in (self.texts, self.images, self.waves) if rows is not None), 0)

    def keys(self) -> list[bytes]:
        """The content of each row as bytes, of prompts alone where there are any: what it is split and chosen by.

        Rows with one prompt (several tasks or targets) are then on one side of a split.
        """
        if self.prompts is not None:
            return [t.encode() for t in self.prompts]
        if self.texts is not None:
            return [t.encode() for t in self.texts]
        return [row.tobytes() for row in (self.waves if self.waves is not None else [] if self.images is None else self.images)]

    def take(self, index: np.ndarray) -> Rows:
        """The rows `index`, in that order."""
        return Rows(
            None if self.texts is None else [self.texts[i] for i in index],
            None if self.images is None else self.images[index],
            None if self.labels is None else self.labels[index],
            None if self.prompts is None else [self.prompts[i] for i in index],
            None if self.tasks is None else self.tasks[index],
            None if self.waves is None else [self.waves[i] for i in index],
        )


@dataclass
class Raw:
    """What a source holds: `splits` by the source's own names (train, validation, test); `rate` samples a second of sound."""

    kind: Literal["text", "images", "sound"]
    name: str
    splits: dict[str, Rows]
    rate: int | None = None

    def sha256(self) -> str:
        """Digest of all content, labels and targets included."""
        total = hashlib.sha256()
        for name, rows in sorted(self.splits.items()):
            total.update(name.encode())
            for key in rows.keys():  # noqa: SIM118  not a dict
                total.update(len(key).to_bytes(8, "big") + key)
            for array in (rows.labels, rows.tasks):
                if array is not None:
                    total.update(array.tobytes())
            for text in rows.texts or () if rows.prompts is not None else ():
                total.update(len(text.encode()).to_bytes(8, "big") + text.encode())
        return total.hexdigest()


def positions(keys: list[bytes], seed: int) -> np.ndarray:
    """A number in [0, 1) for each row that depends on its content and the seed only, so adding a row moves no other."""
    mark = str(seed).encode() + b"/"
    return np.array([int.from_bytes(hashlib.sha256(mark + key).digest()[:7], "big") / 2**56 for key in keys])
