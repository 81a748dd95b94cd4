"""How inputs become vectors: plain data, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerwise.complaint import FORBID
from layerwise.errors import BadInput
from layerwise.stack.spec import Norm


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
        table: where the token vectors come from: `learned` ones are trained, and so are `one-bit` ones, of whose numbers the sign alone is
            read, times a scale for each token (`one-bit-packed` keeps these and is not trained), see `layerwise.embed.one_bit`;
            `packed` ones are whole numbers on a grid and are not trained, see `layerwise.embed.packed`; the
            others never change, see `layerwise.embed.frozen`: `glyphs`, pictures of the tokens, and `binary`, the digits of their ids.
        bits, group: of a packed table: bits of a number, 2, 3, 4 or 8, and neighbours in a vector that share a scale (None: all).
        strings: what is drawn for each token id (for glyphs; filled in when the job runs).
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
    table: Literal["learned", "one-bit", "one-bit-packed", "packed", "glyphs", "binary"] = "learned"
    bits: int = 8
    group: int | None = None
    strings: tuple[str, ...] = ()
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
        if self.bits not in (2, 3, 4, 8) or (self.group is not None and self.group < 1):
            raise BadInput(f"a packed table has 2, 3, 4 or 8 bits and groups of at least 1 number; got {self.bits} and {self.group}")
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


@dataclass(frozen=True)
class GraphSpec:
    """The operations of another network as nodes of a graph: (b, nodes, width), see `layerwise.embed.graph`.

    Attributes:
        channels, size: of the images that the described networks read (None: the data's; filled in when the job runs).
        cutoff: longest path between two nodes that counts as a virtual edge; 1 leaves only the real ones. 50 is GHN-3's.
    """

    kind: Literal["graph"] = "graph"
    channels: int | None = None
    size: tuple[int, int] | None = None
    cutoff: int = 50

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if not 1 <= self.cutoff <= 250:
            raise BadInput(f"cutoff is between 1 and 250 edges; it is {self.cutoff}")


@dataclass(frozen=True)
class PatchSpec:
    """Images cut into patches, each one linear map of its pixels, with tokens of no place before them: (b, prefix + rows columns, width).

    Attributes:
        channels, size: of the image that the positions are made for (None: the data's; filled in when the job runs). Images of other
            sizes get interpolated positions.
        patch: (height, width) of a patch.
        bias: the map has a bias.
        class_token, distill_token: learned vectors before the patches (ViT; DeiT's second one).
        registers: further learned vectors after those two, without a position (Darcet et al. 2024, "Vision Transformers Need Registers").
        mask_token: a learned vector that takes the place of patches hidden by `bool_masked_pos`.
        position: learned absolute positions of everything but registers, or none.
        antialias: positions are interpolated with antialiasing (for smaller images).
        norm: a norm on the sum, with norm_eps; None has none. dropout: on the result.
        mean, std: subtracted from and divided into the pixels first.
    """

    kind: Literal["patches"] = "patches"
    channels: int | None = None
    size: tuple[int, int] | None = None
    patch: tuple[int, int] = (16, 16)
    bias: bool = True
    class_token: bool = True
    distill_token: bool = False
    registers: int = 0
    mask_token: bool = False
    position: Literal["none", "learned"] = "learned"
    antialias: bool = False
    norm: Norm | None = None
    norm_eps: float = 1e-6
    dropout: float = 0.0
    mean: float = 0.0
    std: float = 1.0

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        _check_image(self)
        if min(self.patch) < 1 or (self.size is not None and (self.size[0] < self.patch[0] or self.size[1] < self.patch[1])):
            raise BadInput(f"patch is at least 1 x 1 and at most the image; it is {self.patch} for images of {self.size}")
        if self.distill_token and not self.class_token:
            raise BadInput("a distillation token stands beside a class token: set class_token too")
        if self.registers < 0 or self.norm_eps < 0 or not 0 <= self.dropout < 1:
            raise BadInput(
                f"registers and norm_eps are >= 0 and dropout in [0, 1); got {self.registers}, {self.norm_eps} and {self.dropout}"
            )

    @property
    def placed(self) -> int:
        """Tokens before the patches that have a position."""
        return int(self.class_token) + int(self.distill_token)

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.placed + self.registers

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches in an image of `size`."""
        assert self.size is not None, "the size of images is filled in before a model is built"
        return self.size[0] // self.patch[0], self.size[1] // self.patch[1]


@dataclass(frozen=True)
class StemSpec:
    """The first convolution of a ResNet, with what follows it before the layers: (b, c, h, w) -> (b, width, h', w').

    Attributes:
        channels, size: of the image (None: the data's; filled in when the job runs).
        width: channels it makes. kernel, stride: of the convolution.
        padding: `half` is kernel // 2 on every side; `same` as much as makes the output ceil(input / stride), the odd pixel last.
        standardize: the convolution's filters are standardized with this epsilon (None: not), see `layerwise.nn.convolution`.
        norm: a norm with ReLU after the convolution: batch, group (of `groups` groups), or none.
        pool: the 3x3 max pooling of stride 2 at the end: `max` pads with nothing; `zero` with zeros, which win over negative values
            (BiT); `valid` does not pad; `same` pads with zeros as `same` above; `none` does not pool.
        mean, std: subtracted from and divided into the pixels first.
    """

    kind: Literal["stem"] = "stem"
    channels: int | None = None
    size: tuple[int, int] | None = None
    width: int = 64
    kernel: int = 7
    stride: int = 2
    padding: Literal["half", "same"] = "half"
    standardize: float | None = None
    norm: Literal["batch", "group", "none"] = "batch"
    groups: int = 32
    pool: Literal["max", "zero", "valid", "same", "none"] = "max"
    mean: float = 0.0
    std: float = 1.0

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        _check_image(self)
        if min(self.width, self.kernel, self.stride, self.groups) < 1:
            raise BadInput(
                f"width, kernel, stride and groups are at least 1; got {self.width}, {self.kernel}, {self.stride}, {self.groups}"
            )
        if self.norm == "group" and self.width % self.groups:
            raise BadInput(f"group norm needs width ({self.width}) to be a multiple of groups ({self.groups})")
        if self.padding == "half" and self.kernel % 2 == 0:
            raise BadInput(f"padding half needs an odd kernel; it is {self.kernel}")


def _check_image(spec: PatchSpec | StemSpec) -> None:
    if (spec.channels is not None and spec.channels < 1) or (spec.size is not None and min(spec.size) < 1) or spec.std <= 0:
        raise BadInput(f"channels and size are at least 1 and std above 0; got {spec.channels}, {spec.size} and {spec.std}")
