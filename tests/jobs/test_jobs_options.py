"""Options read off a function's signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest

from layerwise.analyze import ANALYSES
from layerwise.edit import EDITS, PREVIEWS
from layerwise.errors import BadInput
from layerwise.evaluate import EVALUATIONS
from layerwise.jobs.options import checked_options, takes_data
from layerwise.objectives import OBJECTIVES
from layerwise.table import lookup
from layerwise.train.policies import POLICIES


def method(
    model: Any, data: Any = None, *, count: int, rule: Literal["a", "b"] = "a", ratio: float = 0.5, layers: Sequence[int] | None = None
) -> None:
    """Something pluggable."""


class Thing:
    def __init__(self, data: Any = None, *, rate: float = 0.1, every: int = 2) -> None: ...


def test_defaults_are_filled_in_and_types_converted() -> None:
    made = checked_options(method, {"count": "3", "ratio": 1}, "x")
    assert made == {"count": 3, "rule": "a", "ratio": 1.0, "layers": None}
    assert type(made["ratio"]) is float


def test_given_options_are_not_changed() -> None:
    given: dict[str, Any] = {"count": 1}
    checked_options(method, given, "x")
    assert given == {"count": 1}


def test_positional_arguments_are_no_options() -> None:
    with pytest.raises(BadInput, match="x: unknown option 'model'"):
        checked_options(method, {"count": 1, "model": 2}, "x")


def test_options_of_a_class_are_those_of_its_constructor() -> None:
    assert checked_options(Thing, {"every": 5}, "x") == {"rate": 0.1, "every": 5}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, r"x\.count: Field required"),
        ({"cuont": 1}, r"x: unknown option 'cuont'\. Did you mean 'count'\?.* Options: count, layers, ratio, rule"),
        ({"count": "many"}, r"x\.count: .*'many'"),
        ({"count": True}, r"x\.count: .*'True'"),
        ({"count": 1.5}, r"x\.count: .*1\.5"),
        ({"count": 1, "rule": "c"}, r"x\.rule: .*'a' or 'b'.*'c'"),
        ({"count": 1, "layers": "01"}, r"x\.layers"),
        ({"count": 1, "layers": [0, "x"]}, r"x\.layers\.1: .*'x'"),
    ],
)
def test_wrong_option_is_told_with_its_path(options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        checked_options(method, options, "x")


@pytest.mark.parametrize(("options", "told"), [({"rate": 1.0}, "share"), ({"rate": -0.1}, "share"), ({"every": 0}, "at least 1")])
def test_option_with_a_known_meaning_has_its_range(options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        checked_options(Thing, options, "x")


def test_whether_a_function_takes_data_follows_from_its_signature() -> None:
    assert takes_data(method)
    assert not takes_data(lambda model: None)


@pytest.mark.parametrize(
    "table", [OBJECTIVES, EDITS, ANALYSES, EVALUATIONS, POLICIES], ids=["objective", "edit", "analysis", "evaluation", "policy"]
)
def test_every_entry_of_the_tables_has_options_that_can_be_read(table: dict[str, str]) -> None:
    for name in table:
        function = lookup(table, name, "entry")
        try:
            checked_options(function, {}, name)
        except BadInput as error:
            assert "Field required" in str(error)


def test_every_edit_has_a_preview() -> None:
    assert set(PREVIEWS) == set(EDITS)
