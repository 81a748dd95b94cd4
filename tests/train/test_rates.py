"""Learning rates of groups that move while training goes on. Numbers are the checks of card 017 (ADEPT), or of 041 (DLO) where said."""

import dataclasses
from typing import ClassVar

import pytest
import torch

import layerwise as lw
from layerwise.analyze.gradients import mean_gradients
from layerwise.errors import BadInput
from layerwise.jobs.check import check_job
from layerwise.jobs.run import run_job
from layerwise.jobs.schema import read_job
from layerwise.objectives.language import CausalLM
from layerwise.optim.spec import OptimizerSpec, ScheduleSpec
from layerwise.train.loop import Listener, train
from layerwise.train.policies.rates import ImportanceRates, importance, rates
from layerwise.train.spec import TrainSpec

STACK = {"depth": 3, "width": 32, "layer": {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 4}}
FREEZE = {"name": "freeze", "all_but_added": True}


def _model(**layer):
    stack = {**STACK, "layer": {**STACK["layer"], **layer}}
    return lw.load("decoder", seed=1, embedding={"vocab": 262}, stack=stack)


def _spec(*policies, steps=6, **more):
    optimizer = more.pop("optimizer", OptimizerSpec(lr=1e-2, weight_decay=0.1))
    return TrainSpec("causal-lm", steps=steps, batch=4, optimizer=optimizer, policies=policies, clip=None, **more)


class Stopped(Listener):
    """Dies after a step."""

    def __init__(self, stop=None):
        self.stop = stop

    def progress(self, step, total, values):
        if step == self.stop:
            raise RuntimeError("killed")


class Spy(ImportanceRates):
    """Keeps the learning rates of all steps."""

    seen: ClassVar[list] = []

    def after_backward(self, run):
        Spy.seen.append({g["name"]: g["lr"] for g in run.optimizer.param_groups})


def test_rates_lie_between_zero_and_two_affine_and_free_of_scale():
    # 6. lr in [0, 2 lr], affine in the importance, the same for all importances times a constant. 3. Equal ones have the usual rate.
    given = {"a": 3.0, "b": 1.0, "c": 2.5}
    assert rates(given) == {"a": 0.0, "b": 2.0, "c": 0.5}
    assert rates({n: 7e-9 * i for n, i in given.items()}) == pytest.approx(rates(given))
    assert rates({"a": 0.0, "b": 0.0}) == {"a": 1.0, "b": 1.0}


def test_importance_is_the_papers_and_the_published_codes(text):
    model = _model()
    names = [n for n, _ in model.named_parameters()]
    options = {"samples": 32, "split": "train", "batch": 16, "objective": "causal-lm"}
    signed = mean_gradients(model, text, names, **options)
    absolute = mean_gradients(model, text, names, absolute=True, **options)
    # A naive loop over the same rows, as parameter importance is computed in the published code.
    sums = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.named_parameters()}
    starts = [0, len(range(0, len(text.train), 16)) // 2 * 16]
    for start in starts:
        model.zero_grad()
        CausalLM()(model, text.train.batch(torch.arange(start, min(start + 16, len(text.train))))).mean.backward()
        for n, p in model.named_parameters():
            sums[n][0].add_(p.grad)
            sums[n][1].add_(p.grad.abs())
    for n, p in model.named_parameters():
        torch.testing.assert_close(signed[n], sums[n][0] / 2, rtol=1e-4, atol=1e-7)
        assert importance(p.detach(), absolute[n]) == pytest.approx((p.abs() * sums[n][1] / 2).mean().item(), rel=1e-4)
        assert importance(p.detach(), signed[n], signed=True) == pytest.approx((p * sums[n][0] / 2).mean().item(), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "scale", "galore"])
def test_looking_at_the_probe_disturbs_nothing(name, text, monkeypatch):
    # With weights of 1 the run is the plain one to the bit, dropout and moments included, whatever the optimizer.
    options = {"galore": {"rank": 2}}.get(name, {})
    spec = _spec(optimizer=OptimizerSpec(name, lr=1e-3, weight_decay=0.1 if name != "sgd" else 0.0, options=options))
    plain = train(_model(dropout=0.1), text, spec).model.state_dict()
    monkeypatch.setattr("layerwise.train.policies.rates.rates", lambda found: dict.fromkeys(found, 1.0))
    looking = dataclasses.replace(spec, policies=({"name": "importance-rates", "every": 2, "samples": 8},))
    watched = train(_model(dropout=0.1), text, looking, probe=text).model.state_dict()
    assert all(torch.equal(watched[n], value) for n, value in plain.items())


def test_originals_stay_copies_move_and_the_trained_share_is_theirs(text):
    # 4. Original tensors are the same to the bit after training; the trained share is k layers of all parameters.
    base = _model()
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    grown = lw.edit.expand(base, layers=[0, 2])
    trained = train(grown, text, _spec(FREEZE, {"name": "importance-rates", "every": 2, "samples": 8}), probe=text)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    layer = sum(p.numel() for p in base.stack.layers[0].parameters())
    whole = sum(p.numel() for p in grown.parameters())
    assert trained.findings.metrics["trained_share"] == pytest.approx(2 * layer / whole)
    for i in (1, 4):
        assert all(p.any() for p in trained.model.stack.layers[i].parameters())
    assert all(p.requires_grad and not hasattr(p, "group") for p in trained.model.parameters())


def test_rates_wait_for_the_first_measurement_and_follow_the_warm_up(text, monkeypatch):
    # 6. (the rest) lr = base x weight x schedule, through a refresh in the middle of the warm-up.
    monkeypatch.setitem(lw.train.policies.POLICIES, "importance-rates", f"{__name__}:Spy")
    monkeypatch.setattr("layerwise.train.loop.POLICIES", {**lw.train.policies.POLICIES})
    Spy.seen = []
    schedule = ScheduleSpec("linear", warmup=4, floor=0.0)
    spec = _spec(FREEZE, {"name": "importance-rates", "every": 2, "samples": 8}, schedule=schedule, steps=8)
    trained = train(lw.edit.expand(_model(), count=1), text, spec, probe=text)
    factors = [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    weights = [{n: lr / 1e-2 / f for n, lr in seen.items()} for seen, f in zip(Spy.seen, factors, strict=True)]
    assert all(w == pytest.approx(1.0) for step in weights[:2] for w in step.values())
    for step in weights[2:]:
        assert min(step.values()) == pytest.approx(0.0, abs=1e-9) and max(step.values()) == pytest.approx(2.0)
    assert weights[2] == pytest.approx(weights[3]) and weights[3] != pytest.approx(weights[4])
    table = trained.findings.tables[0]
    assert {row[0]: row[2] for row in table.rows} == pytest.approx(weights[7])


def test_a_tensor_of_rate_zero_does_not_decay(text, monkeypatch):
    still = "stack.layers.0.mixer.branch.q.weight"
    monkeypatch.setattr("layerwise.train.policies.rates.rates", lambda found: {n: float(n != still) for n in found})

    def after(steps):
        spec = _spec({"name": "importance-rates", "every": 1, "samples": 8}, steps=steps, schedule=ScheduleSpec("constant", warmup=0))
        return dict(train(_model(), text, spec, probe=text).model.named_parameters())

    one, five = after(1), after(5)  # the first step is taken before any measurement
    assert torch.equal(one[still], five[still]) and not torch.equal(one[still], dict(_model().named_parameters())[still])
    assert not torch.equal(one[still.replace("q.", "k.")], five[still.replace("q.", "k.")])


def test_a_resumed_run_is_the_uninterrupted_one(text, tmp_path):
    spec = _spec(FREEZE, {"name": "importance-rates", "every": 2, "samples": 8}, steps=7, checkpoint_every=3)
    plain = train(lw.edit.expand(_model(), count=1), text, spec, probe=text).model.state_dict()
    with pytest.raises(RuntimeError, match="killed"):
        train(lw.edit.expand(_model(), count=1), text, spec, probe=text, folder=tmp_path, listener=Stopped(stop=4))
    resumed = train(lw.edit.expand(_model(), count=1), text, spec, probe=text, folder=tmp_path).model.state_dict()
    assert all(torch.equal(plain[n], resumed[n]) for n in plain)


def test_layers_learn_by_their_capacity(text, monkeypatch):
    # Card 041, 5: the mean over routed layers of the multiplier is 1.
    kept = []
    original = lw.train.policies.rates.CapacityRates.before_step

    def before_step(self, run):
        original(self, run)
        kept.append((dict(self.weights), {g["name"]: g["initial_lr"] for g in run.optimizer.param_groups if "name" in g}))

    monkeypatch.setattr("layerwise.train.policies.rates.CapacityRates.before_step", before_step)
    model = lw.edit.route_tokens(lw.edit.expand(_model(), count=1), layers=["1:"])
    spec = dataclasses.replace(
        _spec({"name": "capacity-rates"}, steps=5), objective="token-router-lm", options={"capacity": 0.5, "anneal": 2}
    )
    train(model, text, spec)
    for weights, peaks in kept:
        assert list(weights) == ["layer 1", "layer 2", "layer 3"] and sum(weights.values()) / 3 == pytest.approx(1.0)
        assert peaks == pytest.approx({n: 1e-2 * w for n, w in weights.items()})
    assert len({tuple(w.values()) for w, _ in kept}) > 1


def _job(verses, **adapt):
    return {
        "name": "adapt",
        "data": {"source": f"path:{verses}", "length": 32, "tokenizer": {"kind": "bytes"}},
        "model": {"preset": "decoder", "stack": {"depth": 2, "width": 16, "layer": {"heads": 2}}},
        "stages": {
            "grow": {"edit": "expand", "count": adapt.pop("count", 1)},
            "adapt": {
                "train": "causal-lm",
                "data": {"source": "builtin:docs", "documents": 20},
                "probe": {},
                "steps": 3,
                "batch": 4,
                "policies": [FREEZE, {"name": "importance-rates", "every": 1, "samples": 4}],
                **adapt,
            },
        },
    }


def test_a_stage_looks_at_a_second_data_set(verses, tmp_path):
    (tmp_path / "others").mkdir()
    for i in range(12):
        (tmp_path / "others" / f"{i}.txt").write_text(f"line {i} of another text, long enough for some rows\n" * 4)
    receipt = run_job(read_job(_job(verses, data={"source": f"path:{tmp_path / 'others'}"})), tmp_path / "run")
    assert len(receipt.data) == 2 and receipt.metrics["default"]["adapt.trained_share"]["0"] < 1


def test_what_cannot_work_is_refused_before_the_run(verses):
    # 8. Without new layers nothing would be trained.
    def refused(match, change=None, **adapt):
        job = _job(verses, **adapt)
        (change or (lambda j: None))(job)
        with pytest.raises(BadInput, match=match):
            check_job(read_job(job))

    refused("expand it first", count=0)
    refused("give the stage a probe", change=lambda j: j["stages"]["adapt"].pop("probe"))
    refused("parallel: ddp", parallel="fsdp")
    refused("only a stage that trains", change=lambda j: j["stages"]["grow"].update(probe={}))
    refused("reads text but|but builtin:digits", change=lambda j: j["stages"]["adapt"].update(probe={"source": "builtin:digits"}))
    refused("token-router-lm", policies=[{"name": "capacity-rates"}])
