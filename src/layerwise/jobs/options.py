"""The options of a pluggable function, read off its signature: types, defaults and names in one place."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from layerwise.complaint import refuse_truth
from layerwise.errors import BadInput
from layerwise.table import nearest, unknown

COUNTS = ("samples", "batch", "batches_at_most", "every", "draws")
SHARES = ("dropout", "rate")
SPLITS = ("train", "validation", "test")


@functools.cache
def _schema(function: Callable[..., Any]) -> Any:
    target = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (hints.get(name, Any), default)
    return create_model(f"options of {function.__name__}", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)


def checked_options(function: Callable[..., Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keyword-only arguments of `function` from plain data: checked against its annotations, defaults filled in.

    Raises:
        BadInput: an unknown name (the nearest one is given), a missing one, or a wrong type; `where` says in which key.
    """
    schema = _schema(function)
    for name in given:
        if name not in schema.model_fields:
            known = ", ".join(sorted(schema.model_fields)) or "none"
            raise BadInput(f"{where}: unknown option '{name}'.{nearest(str(name), schema.model_fields)} Options: {known}.")
    try:
        made = schema.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *map(str, first["loc"])])
        raise BadInput(f"{place}: {first['msg']} (got {first.get('input')!r})") from error
    options = {name: getattr(made, name) for name in schema.model_fields}
    for name, value in options.items():
        refuse_truth(given.get(name), value, f"{where}.{name}")
        _check_meaning(name, value, f"{where}.{name}")
    return options


def _check_meaning(name: str, value: Any, place: str) -> None:
    """Options of these names mean the same in every function that has one."""
    if name in COUNTS and isinstance(value, int) and value < 1:
        raise BadInput(f"{place} must be at least 1; it is {value}")
    if name in SHARES and isinstance(value, int | float) and not 0 <= value < 1:
        raise BadInput(f"{place} is a share in [0, 1); it is {value}")
    if name in ("split", "splits"):
        for split in [value] if isinstance(value, str) else value:
            if split not in SPLITS:
                raise BadInput(f"{place}: {unknown(split, SPLITS, 'split')}")


def takes_data(function: Callable[..., Any]) -> bool:
    """Whether the function's second positional argument is the data."""
    return "data" in inspect.signature(function).parameters
