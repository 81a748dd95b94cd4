"""Reading YAML strictly: one mapping, no key twice, no aliases, numbers as in YAML 1.2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from layerwise.errors import BadInput

DEEPEST = 64
"""Levels of mappings and lists in a file."""
LARGEST = 200_000
"""Bytes of a file; a job is a page or two, and reading more than this would take minutes."""


class PlainNumbers(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2: `1e-3` is a number, and the slice `4:8` is not one in base 60."""


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$",
    "tag:yaml.org,2002:float": r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$",
}
PlainNumbers.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _NUMBERS] for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    PlainNumbers.add_implicit_resolver(_tag, re.compile(_pattern), list("-+0123456789."))


def parsed_yaml(text: str) -> Any:
    """A YAML text as plain data.

    Raises:
        yaml.YAMLError: it is not YAML, nests too deeply, uses aliases, or holds what Python cannot (a number of 5000 digits).
    """
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except UnicodeError:
        raise
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError("nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping; keys may not repeat."""
    try:
        if path.stat().st_size > LARGEST:
            raise BadInput(f"{path} is too large for a job file: it has {path.stat().st_size:,} bytes, at most {LARGEST:,} are read")
        value = parsed_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"there is no file {path}") from None
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder; a job is a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {error}") from error
    if not isinstance(value, dict):
        kinds = {type(None): "nothing", list: "a list", str: "a text"}
        raise BadInput(
            f"{path} holds {kinds.get(type(value), f'one {type(value).__name__}')}; a job is a mapping with name, model and stages"
        )
    if odd := [key for key in value if not isinstance(key, str)]:
        raise BadInput(f"{odd[0]}: keys of a job are texts; put quotes around it if it is meant")
    return value


class _UniqueKeys(PlainNumbers):
    """A safe loader, but a key given twice is an error instead of a silent loss, and aliases cannot blow up."""

    level = 0

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", key_node.start_mark)
            seen.add(str(key) if not isinstance(key, str | int | float | bool) else key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not used in job files", self.peek_event().start_mark)
        if self.level > DEEPEST:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", self.peek_event().start_mark)
        self.level += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.level -= 1
