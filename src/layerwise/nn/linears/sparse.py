"""Sparse plus low-rank: a thin product, and a few entries at random fixed places."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.nn.linear import Linear
from layerwise.stack.parts_spec import LinearSpec


class SparseLowRank(Linear):
    """y = (s B A + S) x with s = alpha / rank; S has k = floor(density * out * in) trained entries at places drawn once.

    Stored are A, B, the k values and their k places (flat, row by row, ascending; int32 where that suffices). The dense matrix
    is built for a forward or backward pass and dropped after it; autograd keeps none.
    Source: Han et al. 2024, "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
    section 3 (arXiv 2406.02214).
    """

    places: Tensor

    def __init__(self, inner: int, outer: int, bias: bool, spec: LinearSpec) -> None:
        super().__init__(inner, outer, bias)
        assert spec.rank is not None
        count = math.floor(spec.density * inner * outer)
        if count < 1:
            raise BadInput(f"density {spec.density} leaves no entry in a {outer} x {inner} matrix: raise it, or use kind low-rank")
        self.scale = (spec.alpha if spec.alpha is not None else spec.rank) / spec.rank
        self.factor_a = nn.Parameter(torch.empty(spec.rank, inner))
        self.factor_b = nn.Parameter(torch.empty(outer, spec.rank))
        self.values = nn.Parameter(torch.empty(count))
        self.register_buffer("places", torch.empty(count, dtype=torch.int32 if inner * outer < 2**31 else torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _Product.apply(x, self.factor_a, self.factor_b, self.values, self.places, self.scale)
        return y if self.bias is None else y + self.bias

    def materialize(self) -> Tensor:
        return dense(self.factor_a, self.factor_b, self.values, self.places, self.scale)

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """A uniform as in nn.Linear, B zero, values uniform within 1/sqrt(in): at the start the matrix is S alone."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.factor_a, -bound, bound, generator=generator)
        nn.init.zeros_(self.factor_b)
        nn.init.uniform_(self.values, -bound, bound, generator=generator)
        with torch.no_grad():
            self.places.copy_(random_places(self.in_features * self.out_features, len(self.places), generator))
        self._zero_bias()

    @torch.no_grad()
    def take_residual(self, weight: Float[Tensor, "outer inner"], generator: torch.Generator | None = None) -> None:
        """Have the entries of `weight` - s B A as values, so that the whole matrix is `weight` at the places.

        Args:
            generator: of places drawn anew at random; None: where the entries are largest in absolute value.

        Source: Han et al. 2024, section 3 (the pruning study of table 1).
        """
        left = (weight.double() - self.scale * self.factor_b.double() @ self.factor_a.double()).flatten()
        count = len(self.places)
        places = left.abs().topk(count).indices.sort().values if generator is None else random_places(len(left), count, generator)
        self.values, self.places = nn.Parameter(left[places].to(weight.dtype)), places.to(self.places.dtype)


def random_places(entries: int, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """`count` of so many entries, uniformly without replacement, ascending."""
    return torch.randperm(entries, generator=generator, device=generator.device)[:count].sort().values


def dense(
    a: Float[Tensor, "rank inner"], b: Float[Tensor, "outer rank"], values: Float[Tensor, " k"], places: Int[Tensor, " k"], scale: float
) -> Float[Tensor, "outer inner"]:
    """s B A with `values` added at the flat `places`."""
    product = (scale * b) @ a
    return product.reshape(-1).index_add(0, places, values.to(product.dtype)).view_as(product)


class _Product(torch.autograd.Function):
    """x W^T, where W is built from its parts in both directions and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, values: Tensor, places: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, a, b, values, places)
        ctx.scale = scale
        # The small values are added in the parameters' precision, whatever the product is computed in.
        with torch.autocast(x.device.type, enabled=False):
            return x @ dense(a, b, values, places, scale).to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, a, b, values, places = ctx.saved_tensors
        dx = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = dy @ dense(a, b, values, places, ctx.scale).to(dy.dtype)
            gradient = (dy.flatten(0, -2).t() @ x.flatten(0, -2)).to(a.dtype)
            da = ctx.scale * (b.t() @ gradient)
            db = ctx.scale * (gradient @ a.t())
            return dx, da, db, gradient.reshape(-1).index_select(0, places).to(values.dtype), None, None
