"""A layer, and the stream that passes through it while it is calibrated."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxtyping import Bool, Float
from torch import Tensor, nn

from layerwise.edit.quantization.moments import Moments
from layerwise.stack.context import PAD, Context
from layerwise.stack.record import inputs_of

GROUPS = (("mixer", ("q", "k", "v")), ("mixer", ("o",)), ("ffn", ("gate", "up")), ("ffn", ("down",)))
"""The matrices of a layer in the order they are quantized; those of one group read the same inputs."""


class Batches(Protocol):
    """Tensors (b, s, width), one a batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Tensor: ...


@dataclass(frozen=True)
class Passage:
    """A layer with what enters it.

    Attributes:
        index: of the layer in its stack. stream: what enters it, batch by batch. contexts: the surroundings of each batch.
    """

    index: int
    layer: Any
    stream: Batches
    contexts: Sequence[Context]

    def out(self, i: int) -> Float[Tensor, "b s width"]:
        """What leaves the layer."""
        return self.layer(self.stream[i], self.contexts[i], (self.index, 0))

    def group(self, side: str, roles: Sequence[str]) -> dict[str, Any]:
        """The linears of a group that the layer has."""
        branch = getattr(self.layer, side).branch
        return {role: linear for role in roles if (linear := getattr(branch, role, None)) is not None}

    def real(self, i: int) -> Bool[Tensor, "b s"] | None:
        """False at padding; None where there is none."""
        positions = self.contexts[i].positions
        if positions is None or not bool((positions == PAD).any()):
            return None
        return (positions != PAD).expand(self.stream[i].shape[:2])

    def read(self, i: int, *linears: nn.Module) -> list[Tensor]:
        """What some linears read; the layer runs no further than to the last of them."""
        seen: dict[nn.Module, Tensor] = {}

        def see(linear: nn.Module, read: Tensor) -> None:
            seen[linear] = read
            if len(seen) == len(linears):
                raise _Seen

        with inputs_of({linear: linear for linear in linears}, see), contextlib.suppress(_Seen):
            self.out(i)
        return [seen[linear] for linear in linears]

    def moments(self, *linears: Any) -> list[Moments]:
        """Of what some linears read, all tokens but padding alike."""
        made = [Moments(m.in_features, next(m.parameters()).device) for m in linears]
        for i in range(len(self.stream)):
            real = self.real(i)
            for moments, x in zip(made, self.read(i, *linears), strict=True):
                moments.add(x, None if real is None else real.float())
        return made


class _Seen(Exception):
    """All that was to be seen of a layer has been."""
