"""A stack that grows while it trains: incremental training's and Apollo's schedules, their cost, and resuming in the middle."""

import copy

import numpy as np
import pytest
import torch

import layerwise as lw
from layerwise.edit.growth import sources
from layerwise.errors import BadInput
from layerwise.optim.spec import OptimizerSpec, ScheduleSpec
from layerwise.train.checkpoint import load_state
from layerwise.train.loop import Listener, train
from layerwise.train.policies.growth import Growth, repetitions, unrolled_depth
from layerwise.train.spec import TrainSpec

ADAMW = OptimizerSpec(lr=1e-2, weight_decay=0.1)


def _model(depth=4, tie=False):
    layer = {"causal": True, "heads": 2, "norm": "layernorm"}
    return lw.load("decoder", seed=1, embedding={"vocab": 262}, stack={"depth": depth, "width": 16, "layer": layer}, head={"tie": tie})


def _spec(steps, *policies, **more):
    return TrainSpec(
        "causal-lm", steps=steps, batch=4, optimizer=ADAMW, schedule=ScheduleSpec("constant", warmup=0), policies=policies, **more
    )


class _Curve(Listener):
    def __init__(self):
        self.lines = []

    def metrics(self, values):
        self.lines.append(values)


def _layers(model):
    return [torch.cat([p.detach().flatten() for p in layer.parameters()]).clone() for layer in model.stack.layers]


@pytest.fixture
def watched(monkeypatch):
    """Every step's layers, gradients and trainable layers, seen right after the step."""
    seen = []
    original = Growth.after_step

    def after_step(self, run):
        original(self, run)
        trained = [any(p.requires_grad for p in layer.parameters()) for layer in run.model.stack.layers]
        seen.append((_layers(run.model), trained, len(run.optimizer.state)))

    monkeypatch.setattr(Growth, "after_step", after_step)
    return seen


def test_layers_not_in_use_or_at_rest_do_not_change_by_a_bit(text, watched):
    # Incremental training's card, checks 1 and 2: weight decay included.
    model = _model()
    begin = _layers(model)
    train(model, text, _spec(16, {"name": "growth", "depths": [1, 2, 3, 4], "settle": 0.5}))
    states = [begin] + [layers for layers, _, _ in watched]
    for step in range(16):
        stage, half = divmod(step, 4)
        for i in range(4):
            resting = i > stage or (i < stage and half < 2)
            assert torch.equal(states[step][i], states[step + 1][i]) == resting, (step, i)
            assert watched[step][1][i] == (not (i < stage and half < 2))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_counted_cost_is_the_papers_formula(text, stages):
    # Incremental training's card, checks 3 and 4: C = c L T (3 S + 5) / (4 S), and 2 T L c for one stage.
    layers, steps, depth = 4, 16, 4
    depths = [depth // stages * (s + 1) for s in range(stages)]
    found = train(_model(depth), text, _spec(steps, {"name": "growth", "depths": depths, "settle": 0.5}, {"name": "layer-cost"}))
    unit = 4 * 32
    assert found.findings.metrics["layer_cost"] / unit == layers * steps * (3 * stages + 5) / (4 * stages)
    more = 5 / 8 * (1 - 1 / stages) * steps
    assert found.findings.metrics["layer_cost"] / unit + 2 * more * layers == 2 * steps * layers


def test_a_stage_is_the_model_without_its_upper_layers(text):
    # Incremental training's card, check 1: validation in stage s runs layers 0 .. s k - 1.
    model, curve = _model(), _Curve()
    train(model, text, _spec(4, {"name": "growth", "depths": [2, 4]}, val_every=1, val_batches=1), listener=curve)
    first = _model()
    train(first, text, _spec(4, {"name": "growth", "depths": [2, 4]}, val_every=4), listener=Listener())
    shallow = lw.edit.drop_layers(_model(), layers=[2, 3])
    small = _Curve()
    train(shallow, text, _spec(2, val_every=1, val_batches=1), listener=small)
    assert [line["val_loss"] for line in curve.lines][:2] == [line["val_loss"] for line in small.lines]


def test_validation_covers_what_is_unrolled(text):
    curve = _Curve()
    policy = {"name": "growth", "depths": [1, 4], "new": "interpolate", "unroll": "full"}
    train(_model(), text, _spec(4, policy, val_every=2, val_batches=1), listener=curve)
    lines = [line for line in curve.lines if "val_loss" in line]
    assert lines[0]["val_loss"] != lines[0]["val_loss_unrolled"] and lines[-1]["val_loss"] == lines[-1]["val_loss_unrolled"]


def test_unrolled_layers_are_a_weight_tied_network_and_gradients_add_up():
    # Apollo's card, checks 4 and 7: one layer unrolled four times equals four tied layers; its gradient is the sum of untied copies'.
    model = _model(2)
    ids = {"input_ids": torch.arange(20).reshape(2, 10)}
    policy = Growth(depths=[1, 2], new="interpolate", unroll="full")
    counts = repetitions(1, 4, 2)
    assert counts == [4, 0]

    def run_layer(i, layer, x, ctx, call):
        for _ in range(counts[i]):
            x = call(x, ctx)
        return x

    assert torch.equal(model(ids, around=(run_layer,)).logits, model(ids, path=[0, 0, 0, 0]).logits)
    untied = model.with_stack(model.stack.with_layers([copy.deepcopy(model.stack.layers[0]) for _ in range(4)]))
    assert torch.equal(untied(ids).logits, model(ids, around=(run_layer,)).logits)
    model(ids, around=(run_layer,)).logits.square().sum().backward()
    tied = [p.grad.clone() for p in model.stack.layers[0].parameters()]
    model.zero_grad()
    untied(ids).logits.square().sum().backward()
    summed = [sum(gs) for gs in zip(*([p.grad for p in layer.parameters()] for layer in untied.stack.layers), strict=True)]
    for a, b in zip(tied, summed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert policy.unroll == "full"


def test_sampled_depths_have_the_papers_frequencies():
    # Apollo's card, checks 3 and 8: for 12 layers; the depth follows from u monotonously, so an even grid of u has the exact frequencies.
    grid = 1e-6 + (1 - 1e-6) * (np.arange(200_000) + 0.5) / 200_000
    table = {
        1: {1: 0.736, 2: 0.105, 3: 0.053, 4: 0.032, 11: 0.005, 12: 0.0017},
        3: {3: 0.637, 4: 0.104, 12: 0.016},
        6: {6: 0.648, 7: 0.086, 8: 0.067, 9: 0.053, 10: 0.044, 11: 0.036, 12: 0.067},
        12: {12: 1.0},
    }
    means = {1: 1.77, 3: 4.23, 6: 7.14, 12: 12.0}
    for layers, shares in table.items():
        drawn = np.array([unrolled_depth(float(u), layers, 12, "lvps") for u in grid])
        assert drawn.min() >= layers and drawn.max() <= 12
        for depth, share in shares.items():
            assert (drawn == depth).mean() == pytest.approx(share, abs=0.003)
        assert drawn.mean() == pytest.approx(means[layers], abs=0.02)
    uniform = np.array([unrolled_depth(float(u), 3, 12, "uniform") for u in grid])
    assert [(uniform == m).mean() for m in range(3, 13)] == pytest.approx([0.1] * 10, abs=1e-3)
    assert unrolled_depth(0.3, 3, 12, "full") == 12 and unrolled_depth(0.3, 3, 12, "none") == 3
    assert unrolled_depth(0.01, 3, 12, "sigmoid") == 12 and unrolled_depth(0.99, 3, 12, "sigmoid") == 3


def test_growth_copies_layers_and_not_moments(text, watched):
    # Apollo's card, checks 5 and 6, and the trap: moments of layers that were not in use begin empty.
    model = _model()
    train(model, text, _spec(9, {"name": "growth", "depths": [1, 2, 4], "new": "interpolate"}))
    # After the first step of stage 1, layers 0 and 1 come from layer 0; Adam moves each number by at most about lr a step, plus decay.
    before = watched[2][0]
    assert torch.equal(before[1], _layers(_model())[1])
    for i in (0, 1):
        assert (watched[3][0][i] - before[0]).abs().max() < 0.03
    per_layer = len(list(model.stack.layers[0].parameters()))
    others = len(list(model.parameters())) - 4 * per_layer
    assert [state for _, _, state in watched] == [others + per_layer * n for n in (1, 1, 1, 2, 2, 2, 4, 4, 4)]


def test_sampled_depth_is_drawn_for_each_micro_batch(text, monkeypatch):
    drawn = []
    original = Growth._run_layer

    def run_layer(self, i, layer, x, ctx, call):
        out = original(self, i, layer, x, ctx, call)
        if i == 0:
            drawn.append(sum(self._counts))
        return out

    monkeypatch.setattr(Growth, "_run_layer", run_layer)
    policy = {"name": "growth", "depths": [1, 8], "starts": [0, 0.9], "new": "interpolate", "unroll": "uniform"}
    train(_model(8), text, _spec(10, policy, accumulate=4))
    pairs = np.array(drawn[:36]).reshape(9, 4)
    assert len(drawn) == 40 and any(len(set(row)) > 1 for row in pairs) and set(drawn[36:]) == {8}


def test_settling_for_good_frees_the_moments(text, watched):
    # Growing Transformers' card, checks 4 and 5: state for the new block, embedding and head only.
    model = _model()
    train(model, text, _spec(8, {"name": "growth", "depths": [1, 2, 3, 4], "settle": 1.0}))
    assert len({state for _, _, state in watched}) == 1


def test_detached_new_layers_send_nothing_below(text, watched):
    # Incremental training's card, the gap between model and code: with a tied head the embedding still learns through the head.
    model = _model(tie=True)
    policy = {"name": "growth", "depths": [2, 4], "settle": 1.0, "detach": True}
    before = model.embedding.tokens.weight.detach().clone()
    train(model, text, _spec(4, policy))
    assert not torch.equal(before, model.embedding.tokens.weight)
    free = _model(tie=False)
    at_switch = {}
    original = Growth.before_step

    def before_step(self, run):
        original(self, run)
        if run.step == 2:
            at_switch["embedding"] = run.model.embedding.tokens.weight.detach().clone()

    Growth.before_step = before_step
    try:
        train(free, text, TrainSpec("causal-lm", steps=4, batch=4, optimizer=OptimizerSpec(lr=1e-2), policies=(policy,)))
    finally:
        Growth.before_step = original
    assert torch.equal(at_switch["embedding"], free.embedding.tokens.weight)


@pytest.mark.parametrize("stop", [3, 4, 5, 7])
def test_a_run_stopped_anywhere_goes_on_to_the_same_weights(text, tmp_path, stop):
    policies = (
        {"name": "growth", "depths": [1, 2, 4], "starts": [0, 0.34, 0.67], "new": "interpolate", "unroll": "lvps", "settle": 0.4},
        {"name": "layer-cost"},
    )
    spec = _spec(12, *policies, checkpoint_every=1)
    whole = _model()
    cost = train(whole, text, spec).findings.metrics["layer_cost"]

    class Stop(Listener):
        def progress(self, step, total, values):
            if step == stop + 1:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(_model(), text, spec, folder=tmp_path, listener=Stop())
    assert load_state(tmp_path, print)[1]["step"] == stop
    again = _model()
    found = train(again, text, spec, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert found.findings.metrics["layer_cost"] == cost


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depths": [2, 2]}, "depths grow"),
        ({"depths": [1, 3]}, "the last of depths must be 4"),
        ({"depths": [1, 4], "starts": [0.1, 0.5]}, "rising from 0"),
        ({"depths": [1, 4], "starts": [0]}, "each of the 2 depths"),
        ({"depths": [1, 4], "new": "middle"}, "up to depth 2"),
        ({"depths": [1, 2, 3, 4], "settle": 2}, "share of a stage"),
        ({"depths": [1, 2, 4], "starts": [0, 0.01, 0.02]}, "too few"),
    ],
)
def test_impossible_schedules_are_refused(text, options, words):
    # Incremental training's card, check 6: a schedule that would leave layers unused is one of them.
    with pytest.raises(BadInput, match=words):
        train(_model(), text, _spec(4, {"name": "growth", **options}))


def test_interpolated_repetitions_are_the_maps_counts():
    assert repetitions(3, 8, 12) == [3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert sum(repetitions(5, 12, 12)) == 12 == len(sources(5, 12, "interpolate"))
