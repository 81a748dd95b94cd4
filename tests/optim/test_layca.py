"""Card 052: what a Layca step does exactly."""

import copy
import math

import pytest
import torch
from torch import nn

from layerwise.analyze.rotation import cosine_distance, step_rotation
from layerwise.errors import BadInput
from layerwise.optim.layca import Layca, rotation_profile


def _net(seed=0, norm=False):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)] if norm else [nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)]
    return nn.Sequential(*layers).double()


def _backward(net, scale=1.0):
    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (scale * net(x).square().sum()).backward()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
@pytest.mark.parametrize("rho", [3**-2, 3**-5])
@pytest.mark.parametrize("inner", ["sgd", "adam", "rmsprop", "adagrad"])
def test_norm_stays_and_the_angle_is_arctan_rho(scale, rho, inner):
    net = _net()
    before = [p.detach().clone() for p in net.parameters()]
    _backward(net, scale)
    Layca(net.parameters(), lr=rho, inner=inner).step()
    for old, new in zip(before, net.parameters(), strict=True):
        if old.dim() < 2:
            assert torch.equal(old, new), "vectors are untouched, bit for bit"
            continue
        assert new.norm().item() == pytest.approx(old.norm().item(), rel=1e-12)
        distance = cosine_distance(old, new.detach())
        assert distance == pytest.approx(1 - 1 / math.sqrt(1 + rho**2), abs=1e-9)
        assert math.acos(1 - distance) == pytest.approx(math.atan(rho), abs=1e-6)
        assert step_rotation(distance) == pytest.approx(rho, abs=1e-6)


def test_scaling_the_gradient_changes_nothing():
    made = []
    for scale in (1.0, 1e5):
        net = _net()
        _backward(net, scale)
        Layca(net.parameters(), lr=0.1).step()
        made.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_applied_change_is_tangent():
    net, rho = _net(), 0.05
    weight = net[0].weight.detach().clone()
    _backward(net)
    gradient = net[0].weight.grad.clone()
    Layca(net.parameters(), lr=rho).step()
    new = net[0].weight.detach()
    # Before renormalization the new weight is new * sqrt(1 + rho^2); the change from the old one has nothing along it.
    change = new * math.sqrt(1 + rho**2) - weight
    assert (change * weight).sum().abs().item() < 1e-12
    tangent = gradient - (gradient * weight).sum() / weight.norm() ** 2 * weight
    assert torch.nn.functional.cosine_similarity(change.flatten(), -tangent.flatten(), dim=0).item() == pytest.approx(1, abs=1e-12)


def test_scale_invariant_layer_sees_the_same_function_as_unconstrained_sgd():
    rho = 0.1
    ours, plain = _net(norm=True), _net(norm=True)
    _backward(ours), _backward(plain)
    Layca(ours.parameters(), lr=rho).step()
    weight, gradient = plain[0].weight, plain[0].weight.grad
    tangent = gradient - (gradient * weight).sum() / weight.norm() ** 2 * weight
    with torch.no_grad():
        weight -= rho * tangent * weight.norm() / tangent.norm()
    assert weight.norm() > ours[0].weight.norm() * 1.001, "plain descent leaves the sphere"
    x = torch.randn(32, 6, dtype=torch.float64)
    plain[0].bias.data.zero_(), ours[0].bias.data.zero_()
    torch.testing.assert_close(ours[:2](x), plain[:2](x), rtol=1e-5, atol=1e-5)  # BatchNorm's eps is not scale-invariant


def test_a_parameter_without_gradient_or_with_a_zero_one_stays():
    net = _net()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = Layca(net.parameters(), lr=0.1)
    optimizer.step()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for old, new in zip(before, net.parameters(), strict=True):
        torch.testing.assert_close(old, new.detach(), rtol=1e-14, atol=0)


def test_profile():
    assert rotation_profile(0.0, 5) == [1.0] * 5
    assert rotation_profile(0.6, 2) == pytest.approx([0.4**5, 1.0])
    assert rotation_profile(-0.6, 2) == pytest.approx([1.0, 0.4**5])
    assert rotation_profile(0.2, 4) == pytest.approx([0.8 ** (5 * (3 - i) / 3) for i in range(4)])
    with pytest.raises(BadInput, match="alpha"):
        rotation_profile(1.0, 3)


def test_profile_reaches_the_layers_in_order():
    net = _net()
    before = [p.detach().clone() for p in net.parameters() if p.dim() >= 2]
    _backward(net)
    Layca(net.parameters(), lr=0.1, alpha=0.6).step()
    turned = [
        step_rotation(cosine_distance(a, b.detach())) for a, b in zip(before, [p for p in net.parameters() if p.dim() >= 2], strict=True)
    ]
    assert turned == pytest.approx([0.1 * 0.4**5, 0.1], rel=1e-4)


def test_state_survives_a_round_trip():
    net = _net()
    optimizer = Layca(net.parameters(), lr=0.1, inner="adam")
    _backward(net)
    optimizer.step()
    twin = _net()
    twin.load_state_dict(net.state_dict())
    other = Layca(twin.parameters(), lr=0.1, inner="adam")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n, o in ((net, optimizer), (twin, other)):
        o.zero_grad()
        _backward(n)
        o.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weight_decay_is_refused():
    with pytest.raises(BadInput, match="weight_decay"):
        Layca(_net().parameters(), lr=0.1, weight_decay=0.1)


def test_rest_is_trained_only_when_asked():
    net = _net()
    bias = net[0].bias.detach().clone()
    _backward(net)
    Layca(net.parameters(), lr=0.1, train_rest=True, rest_lr=0.5).step()
    torch.testing.assert_close(net[0].bias.detach(), bias - 0.5 * net[0].bias.grad)


def test_the_policy_sees_laycas_turn_of_each_step(digits):
    """Step-wise rotation is the tangent of the angle of one step: rho itself under Layca."""
    from layerwise.models.model import build
    from layerwise.models.spec import model_spec
    from layerwise.optim.spec import OptimizerSpec, ScheduleSpec
    from layerwise.train.loop import train
    from layerwise.train.spec import TrainSpec

    spec = {"embedding": {"kind": "pixels", "channels": 1, "size": [8, 8], "flatten": True}, "head": {"kind": "classifier", "classes": 10}}
    spec["stack"] = {"layers": [{"kind": "dense", "channels": 16, "norm": "batch", "affine": False}], "inputs": 64}
    stage = TrainSpec("classification", steps=6, batch=16, clip=None, optimizer=OptimizerSpec("layca", 0.05),
                      schedule=ScheduleSpec("constant", warmup=0), policies=({"name": "rotation", "every": 2},))  # fmt: skip
    found = train(build(model_spec(spec), 0), digits, stage).findings.metrics
    assert found["turn_mean"] == pytest.approx(0.05, rel=1e-3)


def test_three_steps_with_momentum_are_those_of_the_published_code():
    """ispgroupucl/layer-rotation-tools at 32d70f3, keras/layer_rotation_control.py, its `layca` under SGD with momentum 0.9, run on NumPy."""
    count = torch.arange(12, dtype=torch.float64) ** 2
    weight = nn.Parameter(torch.sin(count * 0.13).view(3, 4))
    optimizer = Layca([weight], lr=0.2, inner="sgd", inner_options={"momentum": 0.9})
    golden = [
        [-0.179126667, -0.041791486, 0.426196403, 1.076730489],
        [-0.350197974, -0.183095729, 0.425564887, 1.223048578],
        [-0.414872479, -0.206477739, 0.516109463, 1.284628318],
    ]
    for t, expected in enumerate(golden):
        weight.grad = torch.cos(count * 0.29 + t).view(3, 4)
        optimizer.step()
        torch.testing.assert_close(weight.detach().flatten()[:4], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-9)
