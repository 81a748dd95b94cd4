"""A receipt that says more than its values do is found out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import BadInput
from layerwise.jobs.catalogue import find, receipts_folder
from layerwise.jobs.receipt import Variant, make_receipt
from layerwise.jobs.schema import read_job
from layerwise.jobs.verify import verify

NAME = "mix-ln"


def honest(new: float = -0.1) -> dict[str, Any]:
    """A receipt of a system with values made up here: the method is better by 0.1 on every seed but for a little noise."""
    job = read_job(find(NAME), scale="small")
    values = {n: {str(s): 2.0 + 0.1 * s + (new + 0.01 * s if n == job.claim.method else 0.0) for s in job.seeds} for n in job.variants}
    metrics = {n: {"evaluate.val_loss": dict(v), "layer-drop.val_loss": {s: x + 1 for s, x in v.items()}} for n, v in values.items()}
    made = make_receipt(job, {n: Variant(values=v, seconds=1.0, params=10) for n, v in values.items()}, metrics, [], "cpu")
    return json.loads(json.dumps(made.dump()))


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    monkeypatch.setenv("LAYERWISE_RECEIPTS", str(tmp_path))
    (tmp_path / "small").mkdir()

    def commit(receipt: Any) -> None:
        (tmp_path / "small" / f"{NAME}.json").write_text(receipt if isinstance(receipt, str) else json.dumps(receipt))

    return commit


@pytest.mark.parametrize(("new", "verdict"), [(-0.1, "holds"), (0.1, "fails"), (-0.01, "inconclusive")])
def test_honest_receipt_is_consistent_whatever_its_verdict(committed: Callable[[Any], None], new: float, verdict: str) -> None:
    committed(honest(new))
    found = verify(NAME, "small")
    assert found == {"system": NAME, "scale": "small", "verdict": verdict, "recomputed": verdict, "ok": True, "problems": []}


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def tamper(receipt: dict[str, Any]) -> None:
        for part in path[:-1]:
            receipt = receipt[part]
        receipt[path[-1]] = to(receipt[path[-1]]) if callable(to) else to

    return tamper


def _drop_seed(receipt: dict[str, Any]) -> None:
    """The worst seed never happened, and everything else is made to follow from that."""
    job = read_job(find(NAME), scale="small")
    for arm in receipt["variants"].values():
        del arm["values"]["2"]
    variants = {n: Variant(values=arm["values"]) for n, arm in receipt["variants"].items()}
    receipt |= json.loads(json.dumps(make_receipt(job, variants, receipt["metrics"], [], "cpu").dump()))


METHOD = ("variants", "mix-ln")
TAMPERED = {
    "verdict": (_set("verdict", to="fails"), "the values imply 'holds', the receipt says 'fails'"),
    "no verdict": (_set("verdict", to=None), "the values imply 'holds'"),
    "mean": (_set(*METHOD, "mean", to=lambda v: v - 0.01), "the mean of 'mix-ln'"),
    "no mean": (_set(*METHOD, "mean", to=None), "the mean of 'mix-ln'"),
    "deviation": (_set(*METHOD, "std", to=0.0), "the standard deviation of 'mix-ln'"),
    "interval": (_set(*METHOD, "ci95", to=[1.0, 1.1]), "the interval of 'mix-ln'"),
    "value of the method": (_set(*METHOD, "values", "1", to=lambda v: v - 0.01), "'mix-ln'"),
    "value of the baseline": (_set("variants", "pre-ln", "values", "0", to=lambda v: v + 0.01), "'pre-ln'"),
    "value of another arm": (_set("variants", "lns", "values", "0", to=lambda v: v + 0.01), "'lns'"),
    "values left out": (_set(*METHOD, "values", to={}), "the mean of 'mix-ln'"),
    "metric": (_set("metrics", "mix-ln", "evaluate.val_loss", "0", to=9.0), "are not those of its metric"),
    "difference": (_set("difference", "mean", to=lambda v: v - 0.01), "the difference does not follow"),
    "difference's interval": (_set("difference", "ci95", to=[-0.2, -0.1]), "the difference does not follow"),
    "difference's ratio": (_set("difference", "ratio", to=0.5), "the difference does not follow"),
    "no difference": (_set("difference", to=None), "the difference does not follow"),
    "claim": (_set("claim", "text", to="anything goes"), "the job's claim differs"),
    "claim's direction": (_set("claim", "direction", to="higher"), "the job's claim differs"),
    "a relation": (_set("relations", to=[{"x": "a", "y": "b", "above": {}, "points": 9, "spearman": 1.0}]), "the relations do not follow"),
    "system": (_set("system", to="demo"), "the receipt is of 'demo'"),
    "an arm left out": (lambda r: r["variants"].pop("lns"), "the job has variants"),
    "a seed left out": (_drop_seed, "no value for seed 2"),
    "scale": (_set("scale", to="full"), "at scale full"),
}


@pytest.mark.parametrize(("tamper", "told"), TAMPERED.values(), ids=list(TAMPERED))
def test_tampered_receipt_is_found_out(committed: Callable[[Any], None], tamper: Callable[[dict[str, Any]], Any], told: str) -> None:
    receipt = honest()
    tamper(receipt)
    committed(receipt)
    found = verify(NAME, "small")
    assert not found["ok"]
    assert any(told in problem for problem in found["problems"]), found["problems"]


@pytest.mark.parametrize(
    ("receipt", "told"),
    [("{", "not JSON"), ("{}", "malformed"), ('{"schema": 2}', "malformed"), ("[]", "malformed"), ("null", "no small receipt|malformed")],
)
def test_file_that_is_no_receipt_is_refused(committed: Callable[[Any], None], receipt: str, told: str) -> None:
    committed(receipt)
    with pytest.raises(BadInput, match=told):
        verify(NAME, "small")


def test_receipt_without_an_arm_of_its_claim_is_refused(committed: Callable[[Any], None]) -> None:
    receipt = honest()
    del receipt["variants"]["mix-ln"]
    committed(receipt)
    with pytest.raises(BadInput, match="lacks a variant"):
        verify(NAME, "small")


def test_missing_receipt_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_RECEIPTS", str(tmp_path))
    with pytest.raises(BadInput, match="no small receipt of 'mix-ln': run 'layerwise run mix-ln --scale small'"):
        verify(NAME, "small")
    with pytest.raises(BadInput, match="unknown system 'mix-nl'"):
        verify("mix-nl", "small")


@pytest.mark.parametrize("file", sorted((receipts_folder() or Path("absent")).glob("*/*.json")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_committed_receipt_is_consistent(file: Path) -> None:
    found = verify(file.stem, file.parent.name)  # type: ignore[arg-type]
    assert found["ok"], found["problems"]
