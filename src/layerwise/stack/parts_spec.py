"""What parts of a layer can be: how a matrix is stored, what a router decides, how positions turn, what a cache keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from layerwise.complaint import FORBID
from layerwise.errors import BadInput


@dataclass(frozen=True)
class LinearSpec:
    """How one weight matrix of a layer is stored and trained.

    Attributes:
        kind: an entry of `layerwise.nn.linear.LINEARS`: `dense`; `lora` (dense and frozen, plus a trained low-rank term);
            `low-rank`; `sparse-low-rank`; `nf4` (4-bit and frozen); `qlora` (nf4 plus a trained low-rank term); `loqt`;
            `packed` (whole numbers on a grid, frozen), `packed-lora` (the same plus a trained low-rank term) and `packed-low-rank`
            (both factors of a low-rank matrix packed);
            `binary` (one-bit matrix and inputs) and `binary-packed` (the same, frozen, eight weights to a byte);
            `shrunk` (dense, with thin factors beside it that make what a cache of kind low-rank keeps; of keys and values only).
        rank: rank of the low-rank term, for the kinds that have one.
        alpha: the low-rank term is scaled by `alpha / rank`, None means `alpha = rank`; `loqt` scales by `alpha` itself (None: 1).
        dropout: dropout on the input of the low-rank term (lora, qlora, packed-lora).
        density: for sparse-low-rank: share of the entries that are trained one by one.
        store: for loqt: its frozen matrices in 4 bits (`nf4`) or as they are (`full`).
        block: for 4-bit matrices: numbers that share a scale. double: the scales are quantized to 8 bits too.
        bits: for packed ones: of a number, 2, 3, 4 or 8. group: inputs of a row that share a scale (None: all of them).
        indexed: which group an input is in is stored too, as groups are not runs of neighbours (GPTQ checkpoints in act-order).
    """

    kind: str = "dense"
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    density: float = 0.03
    store: Literal["nf4", "full"] = "nf4"
    block: int = 64
    double: bool = False
    bits: int = 4
    group: int | None = None
    indexed: bool = False

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8) or (self.group is not None and self.group < 1):
            raise BadInput(f"packed weights have 2, 3, 4 or 8 bits and groups of at least 1 input; got {self.bits} and {self.group}")
        if self.kind in ("lora", "low-rank", "sparse-low-rank", "qlora", "loqt", "packed-lora", "packed-low-rank", "shrunk") and (
            self.rank is None or self.rank < 1
        ):
            raise BadInput(f"a {self.kind} linear needs rank >= 1; rank is {self.rank}")
        if not 0 < self.density <= 1 or self.block < 1:
            raise BadInput(f"density is in (0, 1] and block >= 1; got {self.density} and {self.block}")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout is a probability in [0, 1); it is {self.dropout}")


@dataclass(frozen=True)
class RouterSpec:
    """A linear map from the stream that enters a layer to one logit a token, which decides what of the layer runs.

    Attributes:
        decides: `layer`: for each sequence, from its prompt, whether the whole layer runs (`layerwise.nn.sequence_router`). `ffn`: for each
            token whether its feed-forward runs, attention always does (`layerwise.nn.token_router`).
        bias: initial value of a trained bias (None: no bias). The weight starts at zero.
        threshold: for layer: it runs where the mean of sigmoid(logit / temperature) over the prompt is above this. temperature: below 1
            pushes that towards 0 and 1.
        full_prefill: for layer: it runs for every prompt, and is skipped behind it.
        gap: for ffn: what a feed-forward that runs adds is multiplied by 1 + gap (sigmoid(logit) - 1/2), so that the loss reaches the
            router (0: not).
    """

    decides: Literal["layer", "ffn"] = "layer"
    bias: float | None = None
    threshold: float = 0.5
    temperature: float = 1.0
    full_prefill: bool = False
    gap: float = 0.05

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 or self.temperature <= 0:
            raise BadInput(
                f"a router's threshold lies in [0, 1] and its temperature is above 0; got {self.threshold} and {self.temperature}"
            )
        if not 0 <= self.gap <= 2:
            raise BadInput(f"a router's gap lies in [0, 2], where what it scales keeps its sign; it is {self.gap}")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched so that a model reads longer texts than it was first trained on.

    Attributes:
        kind: `linear` divides every frequency by `factor` (Chen et al. 2023, "Extending Context Window"); `llama3` divides
            the slow ones only, keeps the fast ones and blends in between (Llama 3.1's reference code).
        factor: how much longer.
        low, high: for llama3: frequencies that turn less than `low` times in `original` positions are slow, those that turn
            more than `high` times are fast.
        original: for llama3: the length the model was first trained on.
    """

    kind: Literal["linear", "llama3"] = "linear"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.original < 1 or not 0 < self.low < self.high:
            raise BadInput(f"rope_scaling needs factor > 0, original >= 1 and 0 < low < high; got {self}")


@dataclass(frozen=True)
class CacheSpec:
    """How a layer keeps the keys and values of earlier positions while it decodes. (A layer without one keeps all of them as they are.)

    What a pass reads of its own positions is always exact; what is said here is about what later passes find.

    Attributes:
        kind: `low-rank` keeps thin features of keys and values, from which the linears `k` and `v` of kind `shrunk` make them again,
            and the newest ones in full (CSKV); `recent` keeps the first `sinks` positions and the newest (StreamingLLM); `heavy` keeps,
            for every head, the `heavy` positions that got most attention so far, and the newest (H2O).
        window: number of the newest positions that are in full.
        sliding: for low-rank: the newest `window` positions are always in full. Otherwise a full window is moved to the thin features as a
            block, so that 0 to window - 1 positions are; this is what the published code does, and what the paper draws is `sliding`.
        bits: for low-rank: of a thin feature, 2, 3, 4 or 8 (None: as computed). Keys share a scale over the `window` positions of a block,
            channel by channel; values over `group` channels of a position.
        group: for low-rank: see bits (None: the rank divided by the key/value heads, as published).
        sinks: for recent. heavy: for heavy.
    """

    kind: Literal["low-rank", "recent", "heavy"] = "low-rank"
    window: int = 32
    sliding: bool = False
    bits: int | None = None
    group: int | None = None
    sinks: int = 4
    heavy: int = 32

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0 or self.heavy < 1 or (self.group is not None and self.group < 1):
            raise BadInput(f"a cache needs window, heavy and group >= 1 and sinks >= 0; got {self}")
        if self.bits not in (None, 2, 3, 4, 8):
            raise BadInput(f"thin features have 2, 3, 4 or 8 bits, or none for full precision; got {self.bits}")
        if self.kind != "low-rank" and (self.sliding or self.bits is not None or self.group is not None):
            raise BadInput(f"sliding, bits and group are for a cache of kind low-rank; this one is of kind {self.kind}")
