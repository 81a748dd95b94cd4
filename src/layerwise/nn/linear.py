"""The weight matrices of a layer: one interface, several ways to store and train them.

Every kind is a `Linear`: `forward(x)`, `materialize() -> (out, in)`, the dense matrix it stands for, `merge()`, the dense
linear that computes the same, `initialize(std, generator)` and `bytes`. Kinds with a trained term beside a frozen matrix can
also `fold` it into the matrix and start it anew. `LINEARS` lists the kinds; `LinearSpec.kind` chooses one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import BadInput
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import LayerSpec
from layerwise.table import lookup

LINEARS = {
    "dense": "layerwise.nn.linear:Dense",
    "lora": "layerwise.nn.linear:LoRA",
    "low-rank": "layerwise.nn.linears.lowrank:LowRank",
    "sparse-low-rank": "layerwise.nn.linears.sparse:SparseLowRank",
    "shrunk": "layerwise.nn.linears.shrunk:Shrunk",
    "nf4": "layerwise.nn.linears.quantized:Quantized",
    "qlora": "layerwise.nn.linears.quantized:QLoRA",
    "packed": "layerwise.nn.linears.quantized:Quantized",
    "packed-lora": "layerwise.nn.linears.quantized:QLoRA",
    "packed-low-rank": "layerwise.nn.linears.packed_factors:PackedLowRank",
    "loqt": "layerwise.nn.linears.loqt:LoQT",
    "binary": "layerwise.nn.linears.binary:Binary",
    "binary-packed": "layerwise.nn.linears.binary:PackedBinary",
}


class Linear(nn.Module):
    """A linear map (..., in) -> (..., out), however its matrix is stored.

    Args:
        inner, outer: sizes in and out. bias: whether there is one.
    """

    bias: nn.Parameter | None

    def __init__(self, inner: int, outer: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inner, outer
        self.bias = nn.Parameter(torch.empty(outer)) if bias else None

    def materialize(self) -> Tensor:
        """The dense matrix this module multiplies by, (out, in)."""
        raise NotImplementedError

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """Fresh values; `std` is the standard deviation of the dense matrix they stand for, where the kind has no rule of its own."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.materialize(), self.bias)

    @torch.no_grad()
    def merge(self) -> Dense:
        """The dense linear that computes the same, with a copy of the matrix."""
        weight = self.materialize().detach().clone()
        with torch.device("meta"):
            made = Dense(self.in_features, self.out_features, self.bias is not None)
        made.weight = nn.Parameter(weight)
        made.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return made

    @property
    def bytes(self) -> int:
        """Bytes of everything stored, packed codes and index lists as they are."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))

    def _zero_bias(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Dense(Linear):
    """An ordinary linear map."""

    def __init__(self, inner: int, outer: int, bias: bool, spec: LinearSpec | None = None) -> None:
        super().__init__(inner, outer, bias)
        self.weight = nn.Parameter(torch.empty(outer, inner))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def materialize(self) -> Tensor:
        return self.weight

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """Normal weights with standard deviation `std`, zero bias."""
        nn.init.normal_(self.weight, std=std, generator=generator)
        self._zero_bias()


class LoRA(Dense):
    """A frozen dense matrix W plus a trained low-rank term: y = W x + (alpha / rank) B A dropout(x).

    B starts at zero, so a freshly attached LoRA changes nothing. Source: Hu et al. 2021, "LoRA", section 4.1.
    """

    def __init__(self, inner: int, outer: int, bias: bool, spec: LinearSpec) -> None:
        super().__init__(inner, outer, bias)
        assert spec.rank is not None
        self.scale = (spec.alpha if spec.alpha is not None else spec.rank) / spec.rank
        self.dropout = nn.Dropout(spec.dropout)
        self.lora_a = nn.Parameter(torch.empty(spec.rank, inner))
        self.lora_b = nn.Parameter(torch.empty(outer, spec.rank))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(self.dropout(x), self.lora_a)
        return super().forward(x) + self.scale * F.linear(low, self.lora_b)

    def materialize(self) -> Tensor:
        return self.weight + self.scale * self.lora_b @ self.lora_a

    def initialize(self, std: float, generator: torch.Generator) -> None:
        super().initialize(std, generator)
        self.reset_adapter(generator)

    def reset_adapter(self, generator: torch.Generator) -> None:
        """A uniform as in nn.Linear (bound 1/sqrt(in)), B zero."""
        bound = self.lora_a.shape[1] ** -0.5
        nn.init.uniform_(self.lora_a, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_b)

    @torch.no_grad()
    def fold(self, generator: torch.Generator) -> None:
        """Add the low-rank term to the frozen matrix and start it anew: the function stays, up to rounding."""
        self.weight.copy_(self.materialize())
        self.reset_adapter(generator)


def make_linear(role: str, inner: int, outer: int, bias: bool, spec: LayerSpec) -> Linear:
    """The linear map that `spec.linears` asks for at `role`.

    Raises:
        BadInput: its rank is above what a matrix of that size can have.
    """
    chosen = spec.linears.get(role, LinearSpec())
    if chosen.rank is not None and chosen.kind != "lora" and chosen.rank > min(inner, outer):
        raise BadInput(f"linears.{role}: a {outer} x {inner} matrix has rank {min(inner, outer)} at most; rank is {chosen.rank}")
    return lookup(LINEARS, chosen.kind, "linear")(inner, outer, bias, chosen)
