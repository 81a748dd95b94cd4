"""Fusion by optimal transport: the exact checks of card 068."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog

from layerwise.edit.merging.transport import ot_fuse, transport_map, transport_plan
from layerwise.edit.reset import initialize
from layerwise.errors import BadInput
from layerwise.evaluate.accuracy import classification
from layerwise.evaluate.fusion import fusion_curve
from layerwise.models.model import build
from layerwise.models.spec import model_spec


def _net(widths=(12, 9), seed=0, kind="dense", norm="none", bias=False, size=3, pool=False):
    layer = (
        {"kind": kind, "norm": norm, "bias": bias, "size": size, "pool": pool}
        if kind == "conv"
        else {"kind": kind, "norm": norm, "bias": bias}
    )
    embedding = {"kind": "pixels", "channels": 1, "size": [8, 8], "flatten": kind == "dense"}
    stack = {"layers": [{**layer, "channels": c} for c in widths], "inputs": 64 if kind == "dense" else 1}
    model = (
        build(model_spec({"embedding": embedding, "stack": stack, "head": {"kind": "classifier", "classes": 10, "bias": bias}}), seed)
        .double()
        .eval()
    )
    generator = torch.Generator().manual_seed(seed + 50)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.is_floating_point() and t.dim() == 1:
                t.copy_(torch.rand(t.shape, generator=generator, dtype=t.dtype) + (0.5 if "var" in name else 0.0))
    return model


def _shuffled(model, seed=1):
    """The same function with all hidden neurons in another order."""
    new = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    before = None
    with torch.no_grad():
        for layer in new.stack.layers:
            weight = layer.weight.weight
            order = torch.randperm(len(weight), generator=generator)
            if before is not None:
                weight.copy_(weight[:, before].clone())
            for t in layer.state_dict().values():
                if t.dim():
                    t.copy_(t[order].clone())
            before = order
        new.head.out.weight.copy_(new.head.out.weight[:, before].clone())
    return new


class _Rows:
    """Data of images drawn once."""

    def __init__(self, count=64):
        self.pixels = torch.rand(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        self.train = self

    def __len__(self):
        return len(self.pixels)

    def batch(self, rows):
        return {"pixel_values": self.pixels[rows]}


X = {"pixel_values": torch.rand(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))}
KINDS = [{}, {"kind": "conv"}, {"kind": "conv", "norm": "batch", "bias": True, "pool": True}, {"norm": "batch", "bias": True}]


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("options", KINDS)
def test_a_shuffled_copy_is_put_back_in_order(options, by):
    """Checks 1 and 8."""
    model = _net(**options)
    other = _shuffled(model)
    torch.testing.assert_close(other(X).logits, model(X).logits, rtol=1e-10, atol=1e-12)
    for weight in (0.5, 0.0):
        fused = ot_fuse(model, _Rows(), other=other, by=by, weight=weight, samples=40)
        for name, t in fused.state_dict().items():
            torch.testing.assert_close(t, model.state_dict()[name], rtol=1e-9, atol=1e-10)


def test_a_net_with_itself_and_the_ends_of_the_weight():
    """Checks 2 and 6."""
    a, b = _net(seed=0), _net(seed=1)
    itself = ot_fuse(a, other=a, by="weights")
    assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(itself.parameters(), a.parameters(), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(ot_fuse(b, other=a, by="weights", weight=1.0).parameters(), b.parameters(), strict=True))
    torch.testing.assert_close(ot_fuse(b, other=a, by="weights", weight=0.0)(X).logits, a(X).logits, rtol=1e-10, atol=1e-12)
    plain = ot_fuse(b, other=a, match="none")
    for mean, x, y in zip(plain.parameters(), a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(mean, (x + y) / 2, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", [(7, 7), (6, 9), (10, 4)])
@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_plans_have_their_margins(shape, solver):
    """Check 3."""
    cost = np.random.default_rng(0).random(shape)
    plan = transport_plan(cost, solver=solver, reg=0.05)
    assert (plan >= 0).all()
    np.testing.assert_allclose(plan.sum(axis=1), 1 / shape[0], atol=1e-7)
    np.testing.assert_allclose(plan.sum(axis=0), 1 / shape[1], atol=1e-7)
    generator = torch.Generator().manual_seed(0)
    columns = transport_map(*(torch.randn(n, 5, generator=generator) for n in shape), solver=solver, reg=0.05).sum(dim=0)
    torch.testing.assert_close(columns, torch.ones_like(columns), rtol=0, atol=1e-6)


def test_exact_plans_are_assignments_or_what_a_linear_program_finds():
    """Checks 4, 5 and 7."""
    generator = np.random.default_rng(1)
    cost = generator.random((8, 8))
    plan = transport_plan(cost)
    np.testing.assert_allclose(np.sort(8 * plan, axis=None)[-8:], 1, atol=1e-9)
    rows, columns = linear_sum_assignment(cost)
    exact = (plan * cost).sum()
    assert exact == pytest.approx(cost[rows, columns].sum() / 8)
    costs = [(transport_plan(cost, solver="sinkhorn", reg=r) * cost).sum() for r in (0.5, 0.05, 0.01)]
    assert costs[0] >= costs[1] >= costs[2] >= exact - 1e-9 and costs[2] == pytest.approx(exact, rel=0.05)
    cost = generator.random((5, 8))
    margins = np.zeros((13, 40))
    for i in range(5):
        margins[i, i * 8 : (i + 1) * 8] = 1
    for j in range(8):
        margins[5 + j, j::8] = 1
    best = linprog(cost.ravel(), A_eq=margins, b_eq=np.r_[np.full(5, 1 / 5), np.full(8, 1 / 8)], method="highs")
    assert (transport_plan(cost) * cost).sum() == pytest.approx(best.fun)


def test_other_widths_take_this_models_shapes():
    """Check 7; and rows that sum to one invert a doubled network exactly."""
    wide, narrow = _net((24, 18), seed=0), _net((12, 9), seed=1)
    fused = ot_fuse(narrow, _Rows(), other=wide)
    assert [p.shape for p in fused.parameters()] == [p.shape for p in narrow.parameters()]
    doubled = _net((24, 18), seed=3)
    with torch.no_grad():
        first, second = doubled.stack.layers
        first.weight.weight.copy_(narrow.stack.layers[0].weight.weight.repeat_interleave(2, dim=0))
        second.weight.weight.copy_((narrow.stack.layers[1].weight.weight.repeat_interleave(2, dim=1) / 2).repeat_interleave(2, dim=0))
        doubled.head.out.weight.copy_(narrow.head.out.weight.repeat_interleave(2, dim=1) / 2)
    torch.testing.assert_close(doubled(X).logits, narrow(X).logits)
    back = ot_fuse(narrow, _Rows(), other=doubled, weight=0.0, incoming="rows")
    torch.testing.assert_close(back(X).logits, narrow(X).logits, rtol=1e-9, atol=1e-11)


def test_a_convolution_of_one_pixel_is_a_dense_layer():
    """Check 8."""
    convolutions = [_net(kind="conv", size=1, seed=s) for s in (0, 1)]
    dense = [_net(seed=s) for s in (0, 1)]
    for c, d in zip(convolutions, dense, strict=True):
        d.stack.layers[1].load_state_dict({n: t.flatten(1) for n, t in c.stack.layers[1].state_dict().items()})
    a = transport_map(convolutions[0].stack.layers[1].weight.weight.flatten(1), convolutions[1].stack.layers[1].weight.weight.flatten(1))
    b = transport_map(dense[0].stack.layers[1].weight.weight, dense[1].stack.layers[1].weight.weight)
    assert torch.equal(a, b)


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(BadInput, match="same layers but for their widths"):
        ot_fuse(_net(), other=_net((12, 9, 9)), by="weights")
    with pytest.raises(BadInput, match="match: none needs equal ones"):
        ot_fuse(_net(), other=_net((24, 9)), match="none")
    with pytest.raises(BadInput, match="needs data"):
        ot_fuse(_net(), other=_net(seed=1))


class _Labelled(_Rows):
    """The same with the labels that some network gives."""

    def __init__(self, teacher):
        super().__init__()
        self.validation = self
        self.labels = teacher({"pixel_values": self.pixels}).logits.argmax(dim=1)

    def batch(self, rows):
        return {**super().batch(rows), "labels": self.labels[rows]}


def test_the_curve_between_a_network_and_itself_in_another_order_is_flat_and_a_plain_average_dips():
    net = _net((40, 30))
    data = _Labelled(net)
    other = _shuffled(net)
    found = fusion_curve(net, data, other=other, samples=64)
    assert found.metrics == {"curve_best": 1.0, "curve_weight": 0.0, "curve_mean": 1.0, "curve_ends": 1.0}
    plain = fusion_curve(net, data, other=other, match="none", weights=(0.0, 0.5, 1.0))
    assert plain.metrics["curve_ends"] == 1.0 and plain.tables[0].rows[1][1] < 0.9
    good, bad = net, _net((40, 30), seed=7)  # the labels are the first network's
    for here, there in ((good, bad), (bad, good)):
        both = fusion_curve(here, data, other=there, weights=(0.5,)).metrics
        assert both["curve_ends"] == 1.0 > min(classification(n, data).metrics["accuracy"] for n in (good, bad))
    wide = fusion_curve(_net((12, 9)), data, other=_net((24, 18), seed=3), samples=64, weights=(1.0,))
    assert wide.metrics["curve_best"] == classification(_net((12, 9)), data).metrics["accuracy"]
    with pytest.raises(BadInput, match="weights lie in"):
        fusion_curve(net, data, other=other, weights=(0.5, 1.2))


def test_a_network_is_begun_anew_with_other_widths():
    wide = _net((24, 18))
    layers = [{"kind": "dense", "norm": "none", "channels": c} for c in (12, 9)]
    narrow = initialize(wide, stack={"layers": layers}, seed=4)
    assert [layer.channels for layer in narrow.spec.stack.layers] == [12, 9]
    fused = ot_fuse(narrow, _Rows(), other=wide)
    assert {n: t.shape for n, t in fused.state_dict().items()} == {n: t.shape for n, t in narrow.state_dict().items()}
    with pytest.raises(BadInput, match="stack.layers"):
        initialize(wide, stack={"layers": [{"kind": "denser"}]})
