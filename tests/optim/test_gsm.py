"""Global sparse momentum: the exact checks of card 073, on the optimizer, the cut and the tickets."""

import pytest
import torch

from layerwise.edit.prune.magnitude import densities, kernels, prune_magnitude, rewind
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.spec import model_spec
from layerwise.optim.gsm import GSM, active_masks
from layerwise.optim.spec import OptimizerSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec


def _mlp(seed=0):
    spec = {
        "embedding": {"kind": "pixels", "channels": 1, "size": [8, 8], "flatten": True},
        "head": {"kind": "classifier", "classes": 10, "bias": True},
    }
    spec["stack"] = {"layers": [{"kind": "dense", "channels": c, "norm": "none", "bias": True} for c in (20, 12)], "inputs": 64}
    return build(model_spec(spec), seed)


def _parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(*s, generator=generator, dtype=torch.float64)) for s in ((6, 5), (6,), (3, 6))]


def _fed(optimizer, parameters, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("nesterov", [False, True])
def test_with_all_weights_active_it_is_sgd(nesterov):
    """Check 1."""
    a, b = _parameters(), _parameters()
    ours = _fed(GSM(a, 0.1, 0.01, momentum=0.9, ratio=1, nesterov=nesterov), a)
    theirs = _fed(torch.optim.SGD(b, 0.1, 0.9, weight_decay=0.01, nesterov=nesterov), b)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_so_many_entries_get_the_gradient_and_vectors_always_do():
    """Checks 2 and 6."""
    kernel, bias, dead = (torch.nn.Parameter(torch.ones(s)) for s in ((10, 10), (10,), (4, 5)))
    with torch.no_grad():
        dead.zero_()
        kernel.copy_(torch.arange(100.0).view(10, 10) + 1)
    for p in (kernel, bias, dead):
        p.grad = torch.ones_like(p)
    before = kernel.detach().clone()
    GSM([kernel, bias, dead], 0.1, momentum=0.0, ratio=12).step()
    moved = kernel.detach() != before
    assert int(moved.sum()) == 120 // 12 and moved.flatten()[-10:].all(), "the largest |w g|, over all kernels together"
    assert (bias.detach() == 0.9).all() and (dead.detach() == 0).all(), "a kernel of zeros scores zero"
    by_layer = active_masks([before, dead.detach() + torch.arange(20.0).view(4, 5)], 10, "layer")
    assert [int(m.sum()) for m in by_layer] == [10, 2]


def test_a_weight_that_is_never_active_decays_by_the_two_root_recursion():
    """Check 3: w_{t+1} = (1 + beta - lr eta) w_t - beta w_{t-1}."""
    lr, eta, beta = 0.05, 0.01, 0.9
    w = torch.nn.Parameter(torch.tensor([[1.0, 100.0]], dtype=torch.float64))
    optimizer = GSM([w], lr, eta, momentum=beta, ratio=2)
    path = [1.0]
    for _ in range(200):
        w.grad = torch.tensor([[1e-9, 1e-3]], dtype=torch.float64)
        optimizer.step()
        path.append(w[0, 0].item())
    expected = [1.0, path[1]]
    for _ in range(199):
        expected.append((1 + beta - lr * eta) * expected[-1] - beta * expected[-2])
    assert path[1] == pytest.approx(1 - lr * eta) and path == pytest.approx(expected, rel=1e-6)
    root = max(torch.linalg.eigvals(torch.tensor([[1 + 0.98 - 5e-3 * 1e-4, -0.98], [1.0, 0.0]], dtype=torch.float64)).real)
    assert float(root) ** 200_000 == pytest.approx(0.0067, rel=0.02), "the card's number for the paper's settings"


def test_scores_do_not_see_rescaling_or_decay():
    """Checks 4 and 5."""
    w, g = torch.randn(5, 5), torch.randn(5, 5)
    (mask,), (scaled,) = active_masks([w * g], 5), active_masks([(7 * w) * (g / 7)], 5)
    assert torch.equal(mask, scaled)
    masks = []
    for decay in (0.0, 0.5):
        p = torch.nn.Parameter(w.clone())
        p.grad = g.clone()
        GSM([p], 1.0, decay, momentum=0.0, ratio=5).step()
        masks.append((p.detach() - (w - decay * w)).abs() > 1e-5)
    assert torch.equal(*masks)


def test_the_cut_keeps_so_many_weights_of_all_kernels_together():
    """Check 7."""
    model = _mlp()
    with torch.no_grad():
        model.stack.layers[0].weight.weight.mul_(4)
    total = sum(p.numel() for p in kernels(model).values())
    cut = prune_magnitude(model, ratio=10)
    left = densities(cut)
    assert sum(a for a, _ in left.values()) == total // 10 and left["stack.layers.0.weight.weight"][0] / 1280 > 0.1
    sizes = torch.cat([p.detach().abs().flatten() for p in kernels(model).values()])
    kept = torch.cat([p.detach().abs().flatten() for p in kernels(cut).values()])
    assert kept[kept > 0].min() >= sizes[kept == 0].max() and all((p != 0).any() for p in kernels(model).values())
    with pytest.raises(BadInput, match="at least 1"):
        prune_magnitude(model, ratio=0.5)


def test_a_ticket_is_the_beginning_under_the_mask_and_its_zeros_stay(digits):
    """Check 8."""
    model = _mlp(3)
    start = {n: p.detach().clone() for n, p in kernels(model).items()}
    train(model, digits, TrainSpec("classification", steps=5, batch=16))
    cut = prune_magnitude(model, ratio=5)
    ticket = rewind(cut, seed=3)
    for name, p in kernels(ticket).items():
        assert torch.equal(p.detach(), start[name] * (kernels(cut)[name] != 0))
    spec = TrainSpec(
        "classification",
        steps=8,
        batch=16,
        policies=({"name": "keep-zeros"},),
        optimizer=OptimizerSpec("sgd", 0.1, 0.01, options={"momentum": 0.9}),
    )
    trained = train(ticket, digits, spec)
    for name, p in kernels(ticket).items():
        assert torch.equal(p != 0, kernels(cut)[name] != 0)
    assert trained.findings.metrics["density"] == pytest.approx(0.2, abs=1e-3)
