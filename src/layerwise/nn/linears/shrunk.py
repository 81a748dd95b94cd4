"""A matrix as it is, and two thin ones beside it that make and unmake what a cache keeps of its outputs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.nn.linear import Dense
from layerwise.stack.parts_spec import LinearSpec


class Shrunk(Dense):
    """y = W x + b, and beside it the thin features A x, from which B (A x) + b makes y again, nearly.

    The factors take no part in `forward`; only the objective `cache-reconstruction` trains them.
    Source: Wang et al. 2024, "CSKV", section 3 (arXiv 2409.10593).
    """

    def __init__(self, inner: int, outer: int, bias: bool, spec: LinearSpec) -> None:
        super().__init__(inner, outer, bias)
        assert spec.rank is not None
        self.factor_a = nn.Parameter(torch.empty(spec.rank, inner), requires_grad=False)
        self.factor_b = nn.Parameter(torch.empty(outer, spec.rank), requires_grad=False)

    def shrink(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... rank"]:
        """What is kept of an input."""
        return F.linear(x, self.factor_a)

    def widen(self, thin: Float[Tensor, "... rank"]) -> Float[Tensor, "... out"]:
        """The output that is made of what was kept."""
        return F.linear(thin, self.factor_b, self.bias)

    @property
    def rank(self) -> int:
        """Numbers that are kept of an output."""
        return self.factor_a.shape[0]

    @torch.no_grad()
    def take_factors(self, b: Float[Tensor, "out rank"], a: Float[Tensor, "rank in"]) -> None:
        """Have these factors; without a value before (on the meta device), too."""
        self.factor_a, self.factor_b = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)

    @torch.no_grad()
    def reset_factors(self, generator: torch.Generator) -> None:
        """Normal factors whose product has entries of the deviation that the matrix has: a start that knows nothing of it."""
        each = (self.weight.std() / self.rank**0.5).sqrt().item()
        a, b = (torch.empty_like(t, device=self.weight.device, dtype=self.weight.dtype) for t in (self.factor_a, self.factor_b))
        self.take_factors(*(nn.init.normal_(factor, std=each, generator=generator) for factor in (b, a)))

    def initialize(self, std: float, generator: torch.Generator) -> None:
        super().initialize(std, generator)
        self.reset_factors(generator)
