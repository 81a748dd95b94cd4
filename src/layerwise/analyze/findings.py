"""What an analysis, an edit or an evaluation found: numbers, tables, matrices, remarks. Plain data that reports can draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = float | int | str | None


@dataclass
class Table:
    """Rows under named columns. A first column called `layer` makes it a per-layer table, which reports draw as a heat map."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]


@dataclass
class Matrix:
    """Numbers over two axes; None where there is no value. `values[i][j]` belongs to `y[i]`, `x[j]`."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float | str]
    y: Sequence[float | str]
    values: list[list[float | None]]


@dataclass
class Findings:
    """The result of a stage that looks or measures.

    Attributes:
        metrics: single numbers by name; a claim's metric is one of them.
        tables, matrices: for the report.
        notes: remarks in words.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)
