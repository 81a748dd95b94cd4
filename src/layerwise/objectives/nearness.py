"""Keeping the product of two thin matrices near the matrix it took the place of."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn, stack

from layerwise.errors import BadInput
from layerwise.nn.linear import Dense, Linear

Pair = tuple[Linear, Tensor]


def factored(student: nn.Module, teacher: nn.Module) -> list[Pair]:
    """The student's linears that are not dense, each with the dense matrix of that name in the teacher.

    Raises:
        BadInput: there is none, or one has no such matrix.
    """
    pairs: list[Pair] = []
    theirs = dict(teacher.named_modules())
    for name, module in student.named_modules():
        if isinstance(module, Linear) and type(module) is not Dense:
            other = theirs.get(name)
            if not isinstance(other, Dense) or other.weight.shape != (module.out_features, module.in_features):
                raise BadInput(f"near compares {name} with the teacher's dense matrix of that name and size, which is not there")
            pairs.append((module, other.weight.detach()))
    if not pairs:
        raise BadInput("near keeps factors near the matrices they were made from; this model has none (edit: factorize)")
    return pairs


def nearness(pairs: list[Pair], radius: float, *, hinge: bool = False) -> Float[Tensor, ""]:
    """(1/P) sum_p (max |B_p A_p - W_p| - radius)^2: the largest change of an entry in each matrix is drawn to `radius`.

    Below the radius it pushes outward, as published; with `hinge` a matrix that is near enough has no penalty. The paper's infinity norm
    is the largest absolute entry, as its code has it, and not the largest row sum that the name means for operators.

    Source: Guo et al. 2024, "PELA" (arXiv 2310.10700), section 3.3.
    """
    far = stack([(linear.materialize() - weight).abs().amax() for linear, weight in pairs]) - radius
    return (far.clamp(min=0) if hinge else far).square().mean()
