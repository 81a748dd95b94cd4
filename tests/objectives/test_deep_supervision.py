"""Deeply-supervised nets: the exact checks of card 006."""

import pytest
import torch

from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.spec import model_spec
from layerwise.objectives.classification import Classification
from layerwise.objectives.deep_supervision import DeepSupervision, companion_weight
from layerwise.objectives.hinge import multiclass_hinge, one_vs_all_hinge
from layerwise.optim.groups import parameter_groups
from layerwise.optim.spec import OptimizerSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec


def _cnn(layers=3):
    made = [{"channels": 4, "norm": "none", "bias": True} for _ in range(layers)]
    spec = {
        "embedding": {"kind": "pixels", "channels": 1, "size": [6, 6]},
        "stack": {"layers": made, "inputs": 1},
        "head": {"kind": "classifier", "classes": 3, "bias": True},
    }
    return build(model_spec(spec), 0).double()


BATCH = {
    "pixel_values": torch.rand(5, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "labels": torch.tensor([0, 1, 2, 1, 0]),
}


def _gradients(objective, model):
    model.zero_grad()
    loss = objective(model, BATCH)
    loss.mean.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, loss


def _attached(model, **options):
    objective = DeepSupervision(fade="constant", **options)
    objective.attach(model, BATCH)
    return objective.double()


def test_without_weight_or_under_the_gate_it_is_the_plain_network():
    model = _cnn()
    plain, _ = _gradients(Classification(), model)
    for objective in (_attached(model, alpha=0.0), _attached(model, alpha=0.7, gamma=1e3)):
        found, _ = _gradients(objective, model)
        assert found.keys() == plain.keys() and all(torch.equal(found[n], plain[n]) for n in plain)


def test_gradients_add_up_and_stop_at_their_companion():
    model = _cnn()
    plain, _ = _gradients(Classification(), model)
    parts = []
    for layer in (0, 1):
        objective = _attached(model, alpha=0.7, layers=[layer])
        found, _ = _gradients(objective, model)
        parts.append({n: found[n] - plain[n] for n in plain})
        above = [n for n in plain if any(n.startswith(f"stack.layers.{i}.") for i in range(layer + 1, 3))]
        assert above and all(parts[-1][n].abs().max() < 1e-15 for n in above), "no companion reaches layers above it"
        assert parts[-1]["stack.layers.0.weight.weight"].abs().max() > 0
    both, _ = _gradients(_attached(model, alpha=0.7), model)
    for n in plain:
        torch.testing.assert_close(both[n], plain[n] + parts[0][n] + parts[1][n], rtol=1e-10, atol=1e-12)


def test_the_gate_takes_the_regularized_loss_and_lets_its_whole_gradient_through():
    model = _cnn()
    free = _attached(model, alpha=0.5, layers=[1], decay=0.1)
    plain, _ = _gradients(_attached(model, alpha=0.0, decay=0.1), model)
    open_, loss = _gradients(free, model)
    level = loss.metrics["companion_loss"].item() / 0.5 / len(BATCH["labels"])
    for gamma, gate in ((level + 1e-6, 0.0), (level - 1e-6, 1.0)):
        gated = _attached(model, alpha=0.5, layers=[1], decay=0.1, gamma=gamma)
        gated.load_state_dict(free.state_dict())
        found, value = _gradients(gated, model)
        assert value.metrics["companion_loss"].item() == pytest.approx(gate * 0.5 * 1e-6 * len(BATCH["labels"]), abs=1e-12)
        for n in plain:
            torch.testing.assert_close(found[n], open_[n] if gate else plain[n], rtol=1e-9, atol=1e-12)


def test_the_two_hinges_are_different_losses():
    scores = torch.tensor([[2.0, -2.0, 0.5]], requires_grad=True)
    label = torch.tensor([0])
    loss = one_vs_all_hinge(scores, label)
    assert loss.item() == 2.25 and multiclass_hinge(scores, label).item() == 0.0
    (slope,) = torch.autograd.grad(loss, scores)
    sign = torch.tensor([[1.0, -1.0, -1.0]])
    assert torch.equal(slope, -2 * sign * (1 - sign * scores).clamp(min=0))
    near = torch.tensor([[0.2, 0.5, -1.0]])
    assert multiclass_hinge(near, label).item() == pytest.approx((1 - 0.2 + 0.5) ** 2)


@pytest.mark.parametrize(("fade", "first"), [("linear", 0.3), ("paper", 0.03)])
def test_companions_fade_to_nothing(fade, first):
    weights = [companion_weight(0.3, fade, t, 10) for t in range(11)]
    assert weights[0] == pytest.approx(first) and weights == sorted(weights, reverse=True) and weights[-1] == 0
    assert companion_weight(0.3, "constant", 9, 10) == 0.3


def test_companions_are_no_part_of_the_model_and_raw_ones_read_before_the_relu(digits):
    spec = {"embedding": {"kind": "pixels", "channels": 1, "size": [8, 8]}, "head": {"kind": "classifier", "classes": 10, "bias": True}}
    spec["stack"] = {"layers": [{"channels": 4, "norm": "none", "bias": True}] * 3, "inputs": 1}
    model = build(model_spec(spec), 0)
    names = set(model.state_dict())
    before = model(digits.validation.batch(torch.arange(4))).logits
    objective = DeepSupervision(tap="raw", readout_lr=0.001)
    objective.attach(model, digits.train.batch(torch.arange(2)))
    with objective.companions.watching(model) as seen:
        after = model(digits.validation.batch(torch.arange(4))).logits
    assert torch.equal(before, after) and (seen[0] < 0).any(), "looking changes nothing; raw convolutions have both signs"
    assert {p.lr_scale for p in objective.parameters()} == {0.001}
    train(model, digits, TrainSpec("deep-supervision", steps=3, batch=16, options={"tap": "raw", "loss": "hinge"}))
    assert set(model.state_dict()) == names


def test_what_cannot_be_is_refused(text):
    decoder = build(model_spec({"embedding": {"vocab": 300}, "stack": {"depth": 2, "width": 16}}), 0)
    with pytest.raises(BadInput, match="head of kind classifier"):
        DeepSupervision().attach(decoder, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    with pytest.raises(BadInput, match="layers names layer 9"):
        DeepSupervision(layers=[9]).attach(_cnn(), BATCH)


def test_norms_of_read_outs_are_added_and_companions_have_a_learning_rate_of_their_own():
    model = _cnn()
    with_decay, without = (_attached(model, alpha=0.0, decay=d)(model, BATCH).mean for d in (0.3, 0.0))
    torch.testing.assert_close(with_decay - without, 0.3 * model.head.out.weight.square().sum())
    objective = _attached(model, alpha=1.0, readout_lr=0.001)
    groups = parameter_groups(torch.nn.ModuleList([model, objective]), OptimizerSpec("sgd", 1.0))
    scale_of = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert {scale_of[id(p)] for p in objective.parameters()} == {0.001} and {scale_of[id(p)] for p in model.parameters()} == {1.0}
