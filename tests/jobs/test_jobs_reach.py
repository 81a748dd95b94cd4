"""The cost at which an arm reaches a loss."""

import pytest

from layerwise.errors import BadInput
from layerwise.jobs.reach import final, reached
from layerwise.jobs.run import run_job
from layerwise.jobs.schema import read_job

CURVE = [
    {"step": 10, "loss": 5.0},
    {"step": 10, "val_loss": 4.0, "flops": 100},
    {"step": 20, "val_loss": 3.0, "flops": 300},
    {"step": 30, "loss": 2.0},
]


def test_the_cost_lies_between_the_neighbouring_measurements():
    assert reached(CURVE, 3.5, "val_loss", "flops") == 200
    assert reached(CURVE, 3.0, "val_loss", "flops") == 300
    assert reached(CURVE, 4.2, "val_loss", "step") == 10
    assert reached(CURVE, 2.9, "val_loss", "step") is None
    assert final(CURVE, "val_loss") == 3.0 and final(CURVE, "accuracy") is None


def _job(verses, target="slow", **more):
    base = {
        "name": "race",
        "data": {"source": f"path:{verses}", "length": 32, "tokenizer": {"kind": "bytes"}},
        "model": {"preset": "decoder", "stack": {"depth": 1, "width": 16, "layer": {"heads": 2}}},
        "stages": {"fit": {"train": "causal-lm", "steps": 12, "batch": 4, "val_every": 2, "val_batches": 1, "optimizer": {"lr": 1e-2}}},
        "variants": {"fast": {}, "slow": {"stages.fit.optimizer.lr": 1e-3}},
        "reach": {"steps_to_target": {"stage": "fit", "target": target}},
        "claim": {"text": "t", "metric": "fit.steps_to_target", "direction": "lower", "method": "fast", "baseline": "slow"},
        "seeds": [0, 1, 2],
    }
    return read_job(base | more)


def test_each_seeds_reference_arm_sets_the_target(verses, tmp_path):
    receipt = run_job(_job(verses), tmp_path / "run")
    assert receipt.variants["slow"].values == {"0": 12, "1": 12, "2": 12}
    assert all(value < 12 for value in receipt.variants["fast"].values.values())
    assert receipt.verdict == "holds"


def test_an_arm_that_never_arrives_has_no_value_and_fails(verses, tmp_path):
    receipt = run_job(_job(verses, target="fast", claim={"text": "t", "metric": "fit.steps_to_target", "direction": "lower", "method": "slow", "baseline": "fast"}), tmp_path / "run")  # fmt: skip
    assert receipt.variants["slow"].unreached == [0, 1, 2] and receipt.variants["slow"].values == {}
    assert receipt.verdict == "fails" and "not reached" in " ".join(receipt.notes)


@pytest.mark.parametrize(
    ("reach", "words"), [({"stage": "fit", "target": "fats"}, "nearest|fast"), ({"stage": "fitt", "target": 2.0}, "fit")]
)
def test_targets_and_stages_that_do_not_exist_are_refused(verses, reach, words):
    with pytest.raises(BadInput, match=words):
        _job(verses, reach={"steps_to_target": reach})
