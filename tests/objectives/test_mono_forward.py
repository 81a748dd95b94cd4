"""Mono-Forward: the exact checks of card 069; Forward-Forward, its rival."""

import pytest
import torch
from torch.nn import functional as F

from layerwise.analyze.ledger import SavedTensors
from layerwise.models.model import build
from layerwise.models.spec import model_spec
from layerwise.objectives.classification import Classification
from layerwise.objectives.forward_forward import ForwardForward, goodness, normalized
from layerwise.objectives.mono_forward import MonoForward
from layerwise.optim.spec import OptimizerSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec


def _mlp(depth=3, width=12, seed=0):
    spec = {
        "embedding": {"kind": "pixels", "channels": 1, "size": [4, 4], "flatten": True},
        "stack": {"layers": [{"kind": "dense", "channels": width, "norm": "none", "bias": True}] * depth, "inputs": 16},
        "head": {"kind": "classifier", "classes": 3, "bias": False},
    }
    return build(model_spec(spec), seed).double()


PIXELS = torch.rand(6, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BATCH = {"pixel_values": PIXELS, "labels": torch.tensor([0, 1, 2, 1, 0, 2])}


def _step(model, **options):
    objective = MonoForward(**options)
    objective.attach(model, BATCH)
    objective.double().train()
    model.train()
    loss = objective(model, BATCH)
    assert loss.applied and not loss.total.requires_grad
    return objective


def test_losses_are_local():
    """Checks 1 and 5: changing what is above a layer leaves its gradient as it is, bit for bit."""
    first, second = _mlp(), _mlp()
    with torch.no_grad():
        second.head.out.weight.mul_(3)
        second.stack.layers[2].weight.weight.mul_(-2)
    _step(first), _step(second)
    for i in (0, 1):
        assert torch.equal(first.stack.layers[i].weight.weight.grad, second.stack.layers[i].weight.weight.grad)
    assert not torch.equal(first.stack.layers[2].weight.weight.grad, second.stack.layers[2].weight.weight.grad)
    deep, shallow = _mlp(5), _mlp(3)
    for i in (0, 1):
        shallow.stack.layers[i].load_state_dict(deep.stack.layers[i].state_dict())
    a, b = _step(deep), _step(shallow)
    assert torch.equal(a.readouts.out["0"].weight, b.readouts.out["0"].weight)
    assert torch.equal(deep.stack.layers[0].weight.weight.grad, shallow.stack.layers[0].weight.weight.grad)


def test_a_layers_gradient_is_the_hand_formula():
    """Check 2: dW_i = a_{i-1}^T dz_i, dz = (p - y)/B M * 1[z > 0]."""
    model = _mlp()
    objective = _step(model)
    below = model.stack.layers[0](model.embedding(BATCH)).detach()
    layer, readout = model.stack.layers[1], objective.readouts.out["1"].weight
    z = below @ layer.weight.weight.T + layer.weight.bias
    p = (z.relu() @ readout.T).softmax(dim=1) - F.one_hot(BATCH["labels"], 3)
    dz = (p / len(p)) @ readout * (z > 0)
    torch.testing.assert_close(layer.weight.weight.grad, dz.T @ below, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(layer.weight.bias.grad, dz.sum(dim=0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(objective.readouts.out["1"].weight.grad, (p / len(p)).T @ z.relu(), rtol=1e-12, atol=1e-14)


def test_one_layer_is_backpropagation():
    """Check 3."""
    local, usual = _mlp(1), _mlp(1)
    _step(local)
    Classification()(usual, BATCH).mean.backward()
    for a, b in zip(local.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-15)


def test_greedy_training_touches_one_layer_and_runs_the_finished_ones_as_they_are():
    """Check 4: lower activations are those of the frozen layers, whether made again or kept."""
    model = _mlp()
    objective = MonoForward(schedule="greedy")
    objective.attach(model, BATCH)
    objective.double().train()
    model.train()
    for step, current in ((0, 0), (4, 1), (8, 2)):
        model.zero_grad(set_to_none=True)
        objective.before_step(step, 12, None)
        assert objective.current == current
        objective(model, BATCH)
        touched = [layer.weight.weight.grad is not None for layer in model.stack.layers]
        assert touched == [i == current for i in range(3)] and (model.head.out.weight.grad is not None) == (current == 2)
        if current == 1:
            kept = model.stack.layers[0](model.embedding(BATCH)).detach()
            made = model.stack.layers[1](kept)
            expected = torch.autograd.grad(
                F.cross_entropy(objective.readouts(1, made), BATCH["labels"]), model.stack.layers[1].weight.weight
            )[0]
            torch.testing.assert_close(model.stack.layers[1].weight.weight.grad, expected, rtol=1e-12, atol=1e-15)


def test_memory_is_one_layers_whatever_the_depth():
    """Check 7."""

    def peak(depth, local):
        model = _mlp(depth, 64)
        objective = MonoForward() if local else Classification()
        objective.attach(model, BATCH)
        objective.double().train()
        model.train()
        wide = {"pixel_values": PIXELS.repeat(50, 1, 1, 1), "labels": BATCH["labels"].repeat(50)}
        with SavedTensors([*model.parameters(), *objective.parameters()]) as saved:
            loss = objective(model, wide)
            if not local:
                loss.mean.backward()
        return saved.peak

    assert peak(12, True) == peak(4, True)
    assert peak(12, False) > 2.2 * peak(4, False)


def test_readouts_cost_classes_times_widths_and_go_with_the_stage(digits):
    """Check 8, and sums and single read-outs in what the stage found."""
    spec = {
        "embedding": {"kind": "pixels", "channels": 1, "size": [8, 8], "flatten": True},
        "head": {"kind": "classifier", "classes": 10, "bias": False},
    }
    spec["stack"] = {"layers": [{"kind": "dense", "channels": 32, "norm": "none", "bias": True}] * 3, "inputs": 64}
    model = build(model_spec(spec), 0)
    objective = MonoForward()
    objective.attach(model, digits.train.batch(torch.arange(2)))
    assert sum(p.numel() for p in objective.parameters()) == 10 * 32 * 2
    names = set(model.state_dict())
    trained = train(model, digits, TrainSpec("mono-forward", steps=100, batch=32, clip=None, optimizer=OptimizerSpec(lr=5e-3)))
    assert set(model.state_dict()) == names
    found = trained.findings.metrics
    assert found["last_readout_accuracy"] > 0.5 and found["goodness_sum_accuracy"] > 0.5
    with torch.no_grad():
        rows = digits.validation.batch(torch.arange(len(digits.validation)))
        direct = (model.eval()(rows).logits.argmax(1) == rows["labels"]).double().mean().item()
    assert direct == pytest.approx(found["last_readout_accuracy"])


def test_the_sum_of_read_outs_that_say_nothing_is_the_last_one():
    """Check 6."""
    model = _mlp()
    objective = _step(model)
    with torch.no_grad():
        for head in objective.readouts.out.values():
            head.weight.zero_()
    with torch.no_grad():
        assert torch.equal(torch.stack(objective._scores(model, BATCH)).sum(dim=0), model(BATCH).logits)


def test_forward_forward_is_local_and_learns(digits):
    x = torch.rand(4, 10)
    torch.testing.assert_close(goodness(normalized(x)), torch.ones(4))
    torch.testing.assert_close(normalized(3 * x), normalized(x))
    spec = {
        "embedding": {"kind": "pixels", "channels": 1, "size": [8, 8], "flatten": True},
        "head": {"kind": "classifier", "classes": 10, "bias": False},
    }
    spec["stack"] = {"layers": [{"kind": "dense", "channels": 128, "norm": "none", "bias": True}] * 2, "inputs": 64}
    model = build(model_spec(spec), 0)
    objective = ForwardForward()
    objective.attach(model, digits.train.batch(torch.arange(2)))
    written = objective.written(torch.rand(3, 1, 8, 8), torch.tensor([0, 4, 9]))
    assert torch.equal(written.flatten(1)[:, :10], F.one_hot(torch.tensor([0, 4, 9]), 10).float())
    trained = train(model, digits, TrainSpec("forward-forward", steps=150, batch=64, clip=None))
    assert trained.findings.metrics["goodness_choice_accuracy"] > 0.4
