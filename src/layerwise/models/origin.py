"""What a model remembers of the checkpoint that it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Origin:
    """What the checkpoint of another library held beyond what a model needs, so that it can be written out again.

    Attributes:
        config: its config, whole. generation: its generation settings.
        carried: tensors that our model has no use for (BERT's pooler), by their names there.
        sidecars: text of small files that other libraries read beside it (`layerwise.models.hf.sidecars`), by name.
    """

    config: dict[str, Any]
    generation: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Tensor] = field(default_factory=dict)
    sidecars: dict[str, str] = field(default_factory=dict)


def origin_of(model: nn.Module) -> Origin | None:
    """What the checkpoint held that a model came from, whatever was done to the model since; None for one that was made here."""
    return model.__dict__.get("origin")


def with_origin(model: M, origin: Origin | None) -> M:
    """The model itself, remembering its origin."""
    model.__dict__["origin"] = origin
    return model
