"""The weight matrices of a layer: one interface, several ways to store and train them.

Every kind is an `nn.Module` with `forward(x)`, `materialize() -> (out, in)`, the dense matrix it stands for, and
`initialize(std, generator)`. `LINEARS` lists the kinds; `LinearSpec.kind` chooses one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.stack.spec import LayerSpec, LinearSpec
from layerwise.table import lookup

LINEARS = {"dense": "layerwise.nn.linear:Dense", "lora": "layerwise.nn.linear:LoRA"}


class Dense(nn.Linear):
    """An ordinary linear map: (..., in) -> (..., out)."""

    def __init__(self, inner: int, outer: int, bias: bool, spec: LinearSpec | None = None) -> None:
        super().__init__(inner, outer, bias=bias)

    def materialize(self) -> Tensor:
        """The dense matrix this module multiplies by, (out, in)."""
        return self.weight

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """Normal weights with standard deviation `std`, zero bias."""
        nn.init.normal_(self.weight, std=std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


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


def make_linear(role: str, inner: int, outer: int, bias: bool, spec: LayerSpec) -> Dense:
    """The linear map that `spec.linears` asks for at `role`."""
    chosen = spec.linears.get(role, LinearSpec())
    return lookup(LINEARS, chosen.kind, "linear")(inner, outer, bias, chosen)
