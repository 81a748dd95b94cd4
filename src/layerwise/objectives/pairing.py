"""Which of a student's layers is compared with which of its teacher's."""

from __future__ import annotations

from typing import Literal

from layerwise.errors import BadInput
from layerwise.models.spec import ModelSpec

Pairs = Literal["all"] | dict[int, int] | None


def layer_pairs(student: ModelSpec, teacher: ModelSpec, pairs: Pairs) -> list[tuple[int, int]] | None:
    """(student layer, teacher layer) for each pair, counted from 0; None: what leaves the last layer and its norm.

    Args:
        pairs: student layer -> teacher layer, negative from the top; `all`, of equally many; None: the layers that have filters, k-th with
            k-th, where the teacher has none those at even distances up to its last.

    Raises:
        BadInput: layers that are not there, different numbers of them, or vectors of different sizes, filters taken into account.
    """
    depths = [(spec.decoder or spec.stack).depth for spec in (student, teacher)]
    if pairs == "all":
        chosen = [list(range(depth)) for depth in depths]
    elif pairs is not None:
        chosen = [_inside(list(layers), depth) for layers, depth in zip((pairs, pairs.values()), depths, strict=True)]
    elif student.filters is not None:
        ours = list(student.filters.layers)
        chosen = [ours, list(teacher.filters.layers) if teacher.filters is not None else spread(depths[1], len(ours))]
    elif teacher.filters is not None:
        raise BadInput("the teacher has filters and the student none: give the student some (edit: add-filters), or name pairs of layers")
    else:
        chosen = []
    if chosen and len(chosen[0]) != len(chosen[1]):
        raise BadInput(f"layers are compared pair by pair; the student has {len(chosen[0])} and the teacher {len(chosen[1])}")
    found = list(zip(*chosen, strict=True)) if chosen else None
    for i, j in found or [(-1, -1)]:
        widths = [width_of(spec, layer) for spec, layer in ((student, i), (teacher, j))]
        if widths[0] != widths[1]:
            raise BadInput(
                f"the student's hidden vectors have width {widths[0]}, the teacher's {widths[1]}; they must agree: "
                f"give the student filters of size {widths[1]} (edit: add-filters)"
            )
    return found


def spread(depth: int, count: int) -> list[int]:
    """`count` of `depth` layers at even distances, the last one among them: every n-th, counted from 1."""
    if not count or depth % count:
        raise BadInput(f"{count} layers at even distances need a depth that is a multiple of it; the teacher has {depth}")
    return list(range(depth // count - 1, depth, depth // count))


def width_of(spec: ModelSpec, layer: int) -> int:
    """The size of the vectors of a layer, behind its filter where it has one (-1: of the stack's output)."""
    return spec.filters.size if spec.filters is not None and layer in spec.filters.layers else (spec.decoder or spec.stack).width


def _inside(layers: list[int], depth: int) -> list[int]:
    for i in layers:
        if not -depth <= i < depth:
            raise BadInput(f"pairs names layer {i}; there are layers 0 to {depth - 1}")
    return [i % depth for i in layers]
