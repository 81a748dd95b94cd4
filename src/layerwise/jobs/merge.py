"""Changing plain data by dotted paths: what `--set`, variants and scales do to a job."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from layerwise.errors import BadInput
from layerwise.jobs.yamlfile import parsed_yaml
from layerwise.table import nearest

VERBS = ("train", "edit", "analyze", "evaluate", "generate", "export")


def changed(data: dict[str, Any], overrides: dict[str, Any], where: str) -> dict[str, Any]:
    """`data` with `overrides` applied; their keys are dotted paths, their values plain data.

    A mapping is merged into the mapping that stands there; anything else replaces it. A stage given as null is taken out,
    and a stage that does something else than before replaces the old one whole.

    Raises:
        BadInput: a path goes through something that is no mapping.
    """
    data = copy.deepcopy(data)
    for path, value in overrides.items():
        parts = str(path).split(".")
        if not all(parts):
            raise BadInput(f"{where}: '{path}' is not a path of keys with dots between them")
        place: Any = data
        for depth, part in enumerate(parts[:-1]):
            walked = ".".join(parts[: depth + 1])
            place = _inside(place, part, walked, path, where)
        key: Any = _key(place, parts[-1], str(path), path, where)
        if parts[0] == "stages" and len(parts) == 2 and value is None:
            place.pop(key, None)
        else:
            place[key] = merged(place[key] if isinstance(place, list) else place.get(key), value)
    return data


def _inside(place: Any, part: str, walked: str, path: str, where: str) -> Any:
    """What stands under `part`; an empty mapping is made where nothing does."""
    key = _key(place, part, walked, path, where)
    if isinstance(place, dict) and place.get(key) is None:
        place[key] = {}
    if not isinstance(place[key], dict | list):
        raise BadInput(f"{where}: '{path}' goes through '{walked}', which is {place[key]!r} and has no keys")
    return place[key]


def _key(place: Any, part: str, walked: str, path: str, where: str) -> Any:
    """`part` as a key of a mapping, or as an index of a list."""
    if isinstance(place, dict):
        return next((k for k in place if str(k) == part), part)
    if part.isdigit() and int(part) < len(place):
        return int(part)
    raise BadInput(f"{where}: '{path}': '{walked}' is not one of the {len(place)} entries 0 to {len(place) - 1}")


def merged(old: Any, new: Any) -> Any:
    """`new` laid over `old`: mappings key by key, everything else replaced."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return copy.deepcopy(new)
    # A stage may be called as a verb is; what a verb does is a text or a list.
    if any(verb in new and not isinstance(new[verb], dict) and old.get(verb) != new[verb] for verb in (*VERBS, "like")):
        return copy.deepcopy(new)
    return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}


def alike(stages: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """`stages` with each that has `like: NAME` laid over the stage it names: another of them, or one of `before`.

    Raises:
        BadInput: there is no such stage, or it is like another itself.
    """
    found = {}
    for name, stage in stages.items():
        if isinstance(stage, dict) and "like" in stage:
            known = before | {other: plain for other, plain in stages.items() if other != name}
            other = known.get(str(stage["like"]))
            if not isinstance(other, dict) or "like" in other:
                close = nearest(stage["like"], known)
                raise BadInput(f"stages.{name}.like: the name of a stage that has one of {', '.join(VERBS)}; got '{stage['like']}'.{close}")
            stage = merged(other, {key: value for key, value in stage.items() if key != "like"})
        found[name] = stage
    return found


def setting(text: str) -> tuple[str, Any]:
    """`a.b=value` as (path, value); the value is read as YAML."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise BadInput(f"--set takes path=value, for example stages.pretrain.steps=100; got '{text}'")
    try:
        return path, parsed_yaml(value)
    except yaml.YAMLError as error:
        raise BadInput(f"--set {path}: '{value}' is not YAML: {error}") from error
