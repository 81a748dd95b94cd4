"""What a Hugging Face family is to layerwise: a translation of its config and one table of names, both used in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.models.spec import ModelSpec


@dataclass(frozen=True)
class Pair:
    """Some tensors of ours and the one tensor of theirs that holds the same numbers.

    Attributes:
        ours: our names; several are joined along the first axis (fused query, key, value).
        theirs: their name.
        transpose: theirs is stored the other way round (GPT-2's Conv1D).
    """

    ours: tuple[str, ...]
    theirs: str
    transpose: bool = False

    def pack(self, tensors: list[Tensor]) -> Tensor:
        """Ours to theirs."""
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return (whole.T if self.transpose else whole).contiguous()

    def unpack(self, tensor: Tensor, sizes: list[int]) -> list[Tensor]:
        """Theirs to ours; `sizes` are the lengths of our tensors' first axes."""
        whole = tensor.T if self.transpose else tensor
        if sum(sizes) != whole.shape[0]:
            raise BadInput(f"{self.theirs} has shape {tuple(tensor.shape)}; {' + '.join(map(str, sizes))} rows were expected")
        return [part.contiguous() for part in whole.split(sizes)]


@dataclass(frozen=True)
class Family:
    """One family of Hugging Face models.

    Attributes:
        name: the family. model_types: values of `model_type` it reads; the first is what it writes.
        read: their config -> our description. write: our description -> their config.
        pairs: the table of names for a description.
        obstacle: why a description cannot be held by this family (None: it can).
        ignored: their tensor names (by ending) that hold nothing of their own.
    """

    name: str
    model_types: tuple[str, ...]
    read: Callable[[dict[str, Any]], ModelSpec]
    write: Callable[[ModelSpec], dict[str, Any]]
    pairs: Callable[[ModelSpec], list[Pair]]
    obstacle: Callable[[ModelSpec], str | None]
    ignored: tuple[str, ...] = field(default=())


def same(*ours_theirs: tuple[str, str]) -> list[Pair]:
    """Pairs of tensors that are stored alike."""
    return [Pair((ours,), theirs) for ours, theirs in ours_theirs]


def only(config: dict[str, Any], key: str, allowed: tuple[Any, ...], default: Any) -> Any:
    """A config value that must be one of those we can do.

    Raises:
        BadInput: it is another.
    """
    value = config.get(key, default)
    if value not in allowed:
        raise BadInput(f"config.json: {key} is {value!r}; layerwise can do {', '.join(map(repr, allowed))}")
    return value
