"""A stage with data of its own."""

import json

import pytest

from layerwise.errors import BadInput
from layerwise.jobs.run import run_job
from layerwise.jobs.schema import read_job


def _job(verses, tokenizer="bytes", stage=None):
    return read_job(
        {
            "name": "two-sources",
            "data": {"source": f"path:{verses}", "length": 32, "tokenizer": {"kind": tokenizer}},
            "model": {"preset": "decoder", "stack": {"depth": 1, "width": 16, "layer": {"heads": 2}}},
            "stages": {
                "here": {"evaluate": "language-modeling", "batches_at_most": 1},
                "there": {
                    "evaluate": "language-modeling",
                    "batches_at_most": 1,
                    "data": stage or {"source": "builtin:docs", "documents": 20},
                },
                "again": {"evaluate": "language-modeling", "batches_at_most": 1},
            },
        }
    )


def test_a_stage_reads_its_own_data_and_the_next_one_the_jobs(verses, tmp_path):
    receipt = run_job(_job(verses), tmp_path / "run")
    found = {
        e["stage"]: e["findings"]["metrics"]
        for e in map(json.loads, (tmp_path / "run" / "events.jsonl").open())
        if e["event"] == "stage-finished"
    }
    assert found["here"] == found["again"] != found["there"]
    assert {s["name"] for s in receipt.data} >= {"builtin:docs"} and len(receipt.data) == 2


def test_it_has_to_have_the_jobs_tokens(verses):
    with pytest.raises(BadInput, match="one vocabulary"):
        _job(verses, "bpe")
    with pytest.raises(BadInput, match="sorce"):
        _job(verses, stage={"sorce": "builtin:docs"})
