"""Dotted paths into plain data: what `--set`, variants and scales do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import BadInput
from layerwise.jobs.merge import alike, changed, merged, setting

keys = st.text("abcd", min_size=1, max_size=2)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("xyz", max_size=3), lambda inner: st.dictionaries(keys, inner, max_size=3)
)
mappings = st.dictionaries(keys, plain, max_size=3)


@given(mappings, mappings)
def test_merging_changes_neither_side_and_twice_is_once(old: dict[str, Any], new: dict[str, Any]) -> None:
    before, given_ = copy.deepcopy(old), copy.deepcopy(new)
    once = merged(old, new)
    assert (old, new) == (before, given_)
    assert merged(once, new) == once


@given(mappings)
def test_empty_mapping_is_neutral_on_both_sides(data: dict[str, Any]) -> None:
    assert merged(data, {}) == data
    assert merged({}, data) == data


@given(mappings, mappings, mappings)
def test_merging_is_associative(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> None:
    # Holds where mappings meet mappings; a value that turns from mapping to scalar and back forgets the first one.
    def shape(x: Any) -> Any:
        return {k: shape(v) for k, v in x.items()} if isinstance(x, dict) else None

    def agree(x: Any, y: Any) -> bool:
        return all(
            isinstance(x[k], dict) == isinstance(y[k], dict) and (not isinstance(x[k], dict) or agree(x[k], y[k]))
            for k in x.keys() & y.keys()
        )

    if agree(a, b) and agree(b, c) and agree(a, c):
        assert merged(merged(a, b), c) == merged(a, merged(b, c))


def test_path_reaches_into_mappings_and_lists() -> None:
    data = {"a": {"b": [{"c": 1}, {"c": 2}]}}
    assert changed(data, {"a.b.1.c": 9}, "here") == {"a": {"b": [{"c": 1}, {"c": 9}]}}
    assert data == {"a": {"b": [{"c": 1}, {"c": 2}]}}


def test_path_finds_keys_that_are_numbers() -> None:
    assert changed({"drops": {3: 0.1}}, {"drops.3": 0.2}, "here") == {"drops": {3: 0.2}}


def test_absent_mappings_on_the_way_are_made() -> None:
    assert changed({"model": None}, {"model.stack.depth": 3}, "here") == {"model": {"stack": {"depth": 3}}}


def test_mapping_is_merged_and_a_list_replaced() -> None:
    data = {"model": {"stack": {"depth": 2, "width": 16}}, "seeds": [0, 1]}
    assert changed(data, {"model.stack": {"depth": 4}, "seeds": [5]}, "here") == {
        "model": {"stack": {"depth": 4, "width": 16}},
        "seeds": [5],
    }


def test_later_paths_see_what_earlier_ones_did() -> None:
    assert changed({}, {"a": {"b": 1}, "a.c": 2}, "here") == {"a": {"b": 1, "c": 2}}


def test_stage_given_as_null_is_taken_out_and_others_stay_in_order() -> None:
    data = {"stages": {"one": {"train": "a"}, "two": {"edit": "b"}, "three": {"export": "hf"}}}
    assert list(changed(data, {"stages.two": None}, "here")["stages"]) == ["one", "three"]
    assert changed(data, {"stages.absent": None}, "here") == data


def test_null_elsewhere_is_a_value() -> None:
    assert changed({"stages": {"one": {"clip": 1.0}}}, {"stages.one.clip": None}, "here") == {"stages": {"one": {"clip": None}}}


def test_stage_that_does_something_else_replaces_the_old_one_whole() -> None:
    data = {"stages": {"cut": {"edit": "drop-layers", "count": 2}}}
    assert changed(data, {"stages.cut": {"edit": "lora"}}, "here")["stages"]["cut"] == {"edit": "lora"}
    assert changed(data, {"stages.cut": {"evaluate": "language-modeling"}}, "here")["stages"]["cut"] == {"evaluate": "language-modeling"}
    assert changed(data, {"stages.cut": {"edit": "drop-layers", "rule": "random"}}, "here")["stages"]["cut"] == {
        "edit": "drop-layers",
        "count": 2,
        "rule": "random",
    }


def test_result_shares_nothing_with_what_was_given() -> None:
    value = {"betas": [0.9]}
    made = changed({}, {"options": value}, "here")
    made["options"]["betas"].append(1)
    assert value == {"betas": [0.9]}


@pytest.mark.parametrize("path", ["a.b.c", "list.7", "list.x", "list.-1", "a..b", "", ".a"])
def test_path_that_leads_nowhere_is_named(path: str) -> None:
    with pytest.raises(BadInput, match=r"variants\.x: ") as told:
        changed({"a": {"b": 3}, "list": [1, 2]}, {path: 1}, "variants.x")
    assert f"'{path}'" in str(told.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=3", ("a.b", 3)),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a={b: 1}", ("a", {"b": 1})),
        ("a=", ("a", None)),
        ("a=null", ("a", None)),
        ("a=x=y", ("a", "x=y")),
        ("a=builtin:docs", ("a", "builtin:docs")),
        ("a=1.0e-3", ("a", 0.001)),
    ],
)
def test_setting_is_a_path_and_a_value_in_yaml(text: str, expected: tuple[str, Any]) -> None:
    assert setting(text) == expected


@pytest.mark.parametrize("text", ["a", "=1", "", "a=[1", "a=!!python/object/apply:os.getcwd []"])
def test_setting_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="--set"):
        setting(text)


def test_a_stage_like_another_is_that_one_with_its_own_keys_laid_over_it() -> None:
    stages = {
        "a": {"train": "x", "steps": 9, "optimizer": {"lr": 1, "name": "sgd"}},
        "b": {"like": "a", "steps": 2, "optimizer": {"lr": 3}},
    }
    found = alike(stages, {})
    assert list(found) == ["a", "b"] and found["a"] == stages["a"]
    assert found["b"] == {"train": "x", "steps": 2, "optimizer": {"lr": 3, "name": "sgd"}}
    # One that a variant takes out is found among the job's; one that it changes is meant as changed.
    assert alike({"b": stages["b"]}, {"a": stages["a"]}) == {"b": found["b"]}
    assert alike({"c": {"edit": "y"}, "a": {"like": "a", "steps": 1}}, {"a": stages["a"]})["a"] == {**stages["a"], "steps": 1}
    assert alike({"a": {"edit": "y"}, "b": {"like": "a"}}, {"a": stages["a"]})["b"] == {"edit": "y"}


@pytest.mark.parametrize("name", ["aa", "b", "c"])
def test_a_stage_is_not_like_what_is_not_there_or_not_written_out(name: str) -> None:
    with pytest.raises(BadInput, match=r"stages.b.like: the name of a stage that has one of train"):
        alike({"a": {"train": "x"}, "b": {"like": name}, "c": {"like": "a"}}, {})


def test_a_stage_that_is_called_as_a_verb_is_not_taken_for_one() -> None:
    data = {"stages": {"pretrain": {"train": "x"}, "evaluate": {"evaluate": "y", "batch": 2}}}
    found = changed(data, {"stages": {"cut": {"edit": "z"}, "evaluate": {"batch": 3}}}, "here")["stages"]
    assert found == {"pretrain": {"train": "x"}, "cut": {"edit": "z"}, "evaluate": {"evaluate": "y", "batch": 3}}
    # What says another thing than before replaces a stage whole, in either way.
    assert merged({"train": "x", "steps": 3}, {"like": "a"}) == {"like": "a"}
    assert merged({"like": "a", "steps": 3}, {"train": "x"}) == {"train": "x"}
