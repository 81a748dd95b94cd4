"""Tables of pluggable things: `NAME -> "module:attribute"`, imported only when one is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from layerwise.errors import BadInput


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known name closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(name: str, known: Iterable[str], kind: str) -> BadInput:
    """The error for a `name` that is not among the `known` names of a `kind` of thing."""
    known = sorted(known)
    return BadInput(f"unknown {kind} '{name}'.{nearest(name, known)} Known: {', '.join(known)}.")


def lookup(table: Mapping[str, str], name: str, kind: str) -> Any:
    """Import and return what `table` lists under `name`.

    Raises:
        BadInput: `name` is not in the table; the message names the nearest entry and all known ones.
    """
    if name not in table:
        raise unknown(name, table, kind)
    module, attribute = table[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def member(table: Mapping[str, str], room: str, name: str) -> Any:
    """What `layerwise.<room>.some_name` is: the thing listed as `some-name`. A room's `__getattr__` returns it.

    Raises:
        AttributeError: the room lists no such thing.
    """
    listed = name.replace("_", "-")
    if name.startswith("_") or listed not in table:
        raise AttributeError(f"module 'layerwise.{room}' has no attribute '{name}'")
    return lookup(table, listed, room)
