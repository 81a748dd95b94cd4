"""How inputs become vectors: plain data, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerwise.errors import BadInput
from layerwise.stack.spec import FORBID, Norm


@dataclass(frozen=True)
class TokenSpec:
    """A token embedding.

    Attributes:
        kind: marks this embedding among the others in a job file.
        vocab: number of token ids (None: the tokenizer's; filled in when the job runs).
        position: learned or sinusoidal absolute positions, or none (rotary, ALiBi and relative act inside attention).
        max_length: number of learned positions. offset: rows of their table before position 0 (RoBERTa, OPT and BART have
            two); padding uses the last of them.
        size: of the vectors before they are projected to the stack's width (None: no projection). ELECTRA's factorization.
        types: number of token types (BERT's segments); 0 has none.
        scale: multiplies the token vectors (Gemma, T5-style models and the first Transformer use sqrt(width)).
        std: standard deviation of the initial vectors (None: the stack's `init_std`).
        norm: a norm on the sum, with norm_eps; None has none.
        dropout: on the result.
    """

    kind: Literal["tokens"] = "tokens"
    vocab: int | None = None
    position: Literal["none", "learned", "sinusoidal"] = "none"
    max_length: int = 512
    offset: int = 0
    size: int | None = None
    types: int = 0
    scale: float = 1.0
    std: float | None = None
    norm: Norm | None = None
    norm_eps: float = 1e-6
    dropout: float = 0.0

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.vocab is not None and self.vocab < 1:
            raise BadInput(f"vocab must be at least 1; it is {self.vocab}")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout is a probability in [0, 1); it is {self.dropout}")
        if self.norm_eps < 0 or (self.std is not None and self.std < 0):
            raise BadInput(f"norm_eps and std must be >= 0; they are {self.norm_eps} and {self.std}")
        if self.max_length < 1:
            raise BadInput(f"max_length must be at least 1; it is {self.max_length}")
        if self.offset < 0 or (self.size is not None and self.size < 1):
            raise BadInput(f"offset must be at least 0 and size at least 1; they are {self.offset} and {self.size}")


@dataclass(frozen=True)
class PixelSpec:
    """Images as they are: shifted and scaled, (b, c, h, w), or flattened to (b, c h w).

    Attributes:
        channels, size: of the image (None: the data's; filled in when the job runs).
        mean, std: subtracted and divided, in units of [0, 1] pixels.
        flatten: hand on one vector an image, for stacks of dense layers.
    """

    kind: Literal["pixels"] = "pixels"
    channels: int | None = None
    size: tuple[int, int] | None = None
    mean: float = 0.5
    std: float = 0.5
    flatten: bool = False

    __pydantic_config__ = FORBID
