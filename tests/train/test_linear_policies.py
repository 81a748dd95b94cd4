"""LoQT's merges, ReLoRA's restarts and updates inside the backward pass."""

import pytest
import torch

from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.linears.loqt import LoQT
from layerwise.optim.spec import OptimizerSpec, ScheduleSpec
from layerwise.train.loop import Listener, train
from layerwise.train.policies.loqt import update_steps
from layerwise.train.policies.policy import Policy
from layerwise.train.spec import TrainSpec


def _model(vocab, linear=None):
    data = preset("decoder")
    data["stack"] |= {"depth": 2, "width": 32}
    data["stack"]["layer"] |= {"heads": 2, "linears": {"*": linear} if linear else {}}
    data["embedding"] = {"vocab": vocab}
    return build(model_spec(data))


def _spec(policies=(), steps=8, **more):
    return TrainSpec(
        "causal-lm",
        steps=steps,
        batch=4,
        policies=tuple(policies),
        schedule=ScheduleSpec(warmup=2),
        optimizer=OptimizerSpec(lr=1e-2),
        **more,
    )


LOQT = {"kind": "loqt", "rank": 4, "alpha": 0.5}
UPDATES = {"name": "loqt", "gap": 3, "growth": 1.2}


def test_loqt_7_the_schedule_grows():
    assert update_steps(600, 100, 1.2)[:6] == [0, 100, 201, 302, 403, 505]
    assert update_steps(10, 3, None) == [0, 3, 6, 9]


def test_loqt_5_between_updates_only_the_free_factor_moves(text):
    model = _model(text.vocab, LOQT)
    seen = []

    class Watch(Policy):
        def after_step(self, run):
            linear = next(m for m in model.modules() if isinstance(m, LoQT))
            seen.append({n: t.clone() for n, t in linear.state_dict().items()})

    from layerwise.train import policies

    watch = Watch()
    policies.POLICIES["watch"] = f"{__name__}:_watch"
    globals()["_watch"] = lambda: watch
    try:
        train(model, text, _spec([UPDATES, {"name": "watch"}], steps=7))
    finally:
        del policies.POLICIES["watch"]
    frozen = [n for n in seen[0] if n != "free"]
    for step in range(1, 7):
        same = all(torch.equal(seen[step][n], seen[step - 1][n]) for n in frozen)
        assert same == (step not in update_steps(7, 3, 1.2)), step
        assert not torch.equal(seen[step]["free"], seen[step - 1]["free"])


def test_dense_gradients_of_an_update_never_meet_and_it_makes_no_difference_to_the_weights(text, monkeypatch):
    found, weights = [], []
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(LoQT, "open", lambda self, heard, plain=LoQT.open: plain(self))
        model = _model(text.vocab, LOQT)
        found.append(train(model, text, _spec([UPDATES], steps=5)).findings.metrics["update_bytes"])
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    sizes = [m.out_features * m.in_features * 4 for m in model.modules() if isinstance(m, LoQT)]
    assert found == [2 * max(sizes), sum(sizes) + sizes[0]]


class _Stop(Listener):
    def __init__(self, at):
        self.at = at

    def progress(self, step, total, values):
        if step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("linear", "policy", "clip"),
    [
        (LOQT, UPDATES, 1.0),
        ({"kind": "lora", "rank": 4}, {"name": "restart-adapters", "every": 3, "rewarm": 1}, 1.0),
        ({"kind": "sparse-low-rank", "rank": 4}, {"name": "per-layer-updates"}, None),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_weights(linear, policy, clip, text, tmp_path):
    spec = _spec([policy], clip=clip, checkpoint_every=2)
    whole = _model(text.vocab, linear)
    train(whole, text, spec)
    with pytest.raises(KeyboardInterrupt):
        train(_model(text.vocab, linear), text, spec, folder=tmp_path, listener=_Stop(5))
    resumed = _model(text.vocab, linear)
    train(resumed, text, spec, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_sltrain_8_updates_inside_the_backward_pass_give_the_same_weights_and_gradients_never_meet(text):
    usual, ours = _model(text.vocab), _model(text.vocab)
    first = train(usual, text, _spec([{"name": "ledger"}], clip=None))
    second = train(ours, text, _spec([{"name": "per-layer-updates"}, {"name": "ledger"}], clip=None))
    assert all(torch.equal(a, b) for a, b in zip(usual.state_dict().values(), ours.state_dict().values(), strict=True))
    sizes = [p.numel() * 4 for p in ours.parameters()]
    assert first.findings.metrics["grad_bytes"] == sum(sizes)
    assert second.findings.metrics["grad_bytes"] == max(sizes)
    assert first.findings.metrics["optimizer_bytes"] == second.findings.metrics["optimizer_bytes"]


def test_updates_inside_the_backward_pass_refuse_what_needs_all_gradients(text):
    for more, word in (({"clip": 1.0}, "clip: null"), ({"clip": None, "accumulate": 2}, "accumulate: 1")):
        with pytest.raises(BadInput, match=word):
            train(_model(text.vocab), text, _spec([{"name": "per-layer-updates"}], **more))


def test_restarts_fold_the_terms_and_raise_the_rank_of_what_was_learned(text):
    linear = {"kind": "lora", "rank": 2}
    start, once, often = (_model(text.vocab, linear) for _ in range(3))
    train(once, text, _spec(steps=12))
    train(often, text, _spec([{"name": "restart-adapters", "every": 4, "rewarm": 1}], steps=12))

    def rank(model):
        change = model.stack.layers[0].mixer.branch.q.materialize() - start.stack.layers[0].mixer.branch.q.materialize()
        return torch.linalg.matrix_rank(change.detach(), rtol=1e-4).item()

    assert rank(once) == 2 and rank(often) > 2


def test_learning_rate_climbs_back_after_a_restart(text):
    class Rates(Listener):
        def __init__(self):
            self.seen = []

        def metrics(self, values):
            self.seen.append(values["lr"])

    usual, ramped = Rates(), Rates()
    policy = {"name": "restart-adapters", "every": 4, "rewarm": 3}
    for rates, policies in ((usual, ()), (ramped, (policy,))):
        train(_model(text.vocab, {"kind": "lora", "rank": 2}), text, _spec(policies, steps=10, log_every=1), listener=rates)
    shares = [a / b for a, b in zip(ramped.seen, usual.seen, strict=True)]
    assert shares == pytest.approx([1, 1, 1, 1, 0.25, 0.5, 0.75, 1, 0.25, 0.5])


@pytest.mark.parametrize("name", ["loqt", "restart-adapters"])
def test_policies_name_the_linears_they_miss(name, text):
    with pytest.raises(BadInput, match="set model.stack.layer.linears"):
        train(_model(text.vocab), text, _spec([{"name": name}]))


def test_sltrain_and_loqt_hold_fewer_bytes_than_adam_over_dense_matrices(text):
    held = {}
    for name, linear, policies in (
        ("full", None, []),
        ("sltrain", {"kind": "sparse-low-rank", "rank": 4}, []),
        ("loqt", LOQT, [UPDATES]),
    ):
        found = train(_model(text.vocab, linear), text, _spec([*policies, {"name": "ledger"}], steps=3)).findings.metrics
        held[name] = found["state_bytes"]
    assert held["sltrain"] < held["full"] and held["loqt"] < held["full"]


def test_the_ledger_counts_the_free_factors_gradients_though_the_first_step_leaves_none(text):
    model = _model(text.vocab, LOQT)
    found = train(model, text, _spec([UPDATES, {"name": "ledger", "every": 1000}], steps=3)).findings.metrics
    assert found["grad_bytes"] == sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
