"""A preset with changes is what a job with the same changes describes, however deep they go."""

from __future__ import annotations

import pytest

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.jobs.schema import read_job
from layerwise.models.presets import PRESETS, preset


def test_a_deep_change_keeps_what_stands_beside_it_as_in_a_job() -> None:
    changes = {"embedding": {"vocab": 32}, "stack": {"depth": 2, "width": 16, "layer": {"heads": 2, "ffn_width": 24}}}
    model = lw.load("decoder", **changes)
    assert model.stack.spec.layer.causal and model.stack.spec.layer.heads == 2
    job = read_job(
        {
            "name": "j",
            "data": {"source": "builtin:docs"},
            "model": {"preset": "decoder", **changes},
            "stages": {"c": {"analyze": "weight-sizes"}},
        }
    )
    assert job.plans()["default"].model == model.spec


def test_a_change_leaves_the_preset_alone_and_replaces_what_is_no_mapping() -> None:
    before = preset("decoder")
    changed = preset("decoder", {"stack": {"depth": 3}, "head": None})
    assert changed["stack"]["depth"] == 3 and changed["head"] is None
    assert preset("decoder") == before == PRESETS["decoder"]


def test_a_change_that_no_part_has_is_named() -> None:
    with pytest.raises(BadInput, match="widht"):
        lw.load("decoder", stack={"widht": 16})
