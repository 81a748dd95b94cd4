"""GaLore, Fira and APOLLO: equal to their formulas step by step, small states, limits that must hold."""

import pytest
import torch

from layerwise.errors import BadInput
from layerwise.optim.lowrank import APOLLO, Fira, GaLore, limited
from layerwise.optim.spec import OptimizerSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec

BETAS, EPS = (0.9, 0.99), 1e-8


def _gradients(shape, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def _adam(small, state):
    state["t"] = state.get("t", 0) + 1
    state["m"] = BETAS[0] * state.get("m", 0) + (1 - BETAS[0]) * small
    state["v"] = BETAS[1] * state.get("v", 0) + (1 - BETAS[1]) * small**2
    return state["m"] / (1 - BETAS[0] ** state["t"]) / ((state["v"] / (1 - BETAS[1] ** state["t"])).sqrt() + EPS)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("kind", [GaLore, Fira])
def test_equal_to_the_formulas(kind, shape):
    w = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = kind([w], 0.1, rank=2, gap=3, scale=0.25, betas=BETAS, eps=EPS)
    expected, state, last = torch.zeros(shape, dtype=torch.float64), {}, None
    for t, gradient in enumerate(_gradients(shape, 7)):
        g = gradient if shape[0] <= shape[1] else gradient.T
        if t % 3 == 0:
            basis = torch.linalg.svd(g, full_matrices=False).U[:, :2]
        small = basis.T @ g
        adapted = _adam(small, state)
        update = basis @ adapted
        if kind is Fira:
            rest = (g - basis @ small) * (adapted.norm(dim=0) / small.norm(dim=0))
            if last is not None and rest.norm() > 1.01 * last:
                rest = rest * (1.01 * last / rest.norm())
            last = rest.norm()
            update = update + rest
        expected -= 0.1 * 0.25 * (update if shape[0] <= shape[1] else update.T)
        w.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-12)


def test_apollo_keeps_the_gradients_direction_and_no_projection():
    w = torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    optimizer = APOLLO([w], 1.0, rank=2, betas=BETAS)
    (gradient,) = _gradients((5, 8), 1)
    w.grad = gradient.clone()
    optimizer.step()
    cosine = torch.nn.functional.cosine_similarity(-w.detach(), gradient, dim=0)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    assert {k for k, v in optimizer.state[w].items() if isinstance(v, torch.Tensor) and v.dim()} == {"exp_avg", "exp_avg_sq"}
    again = torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    again.grad = gradient.clone()
    APOLLO([again], 1.0, rank=2, betas=BETAS).step()
    assert torch.equal(again, w), "projections come from the seed"
    mini = torch.nn.Parameter(torch.zeros(5, 8, dtype=torch.float64))
    mini.grad = gradient.clone()
    APOLLO([mini], 1.0, rank=1, scope="tensor", scale=128**0.5, betas=BETAS).step()
    ratio = -mini.detach() / gradient
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))


def test_states_are_small_and_other_roles_take_adams_step():
    matrix, head = (torch.nn.Parameter(torch.randn(20, 30)) for _ in range(2))
    groups = [{"params": [matrix], "role": "matrix"}, {"params": [head], "role": "head"}]
    optimizer = GaLore(groups, 0.1, rank=4)
    for p in (matrix, head):
        p.grad = torch.randn_like(p)
    optimizer.step()
    count = {id(p): sum(v.numel() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)) for p in (matrix, head)}
    assert count[id(matrix)] == 2 * 4 * 30 + 20 * 4 and count[id(head)] == 2 * 600


def test_norms_grow_by_one_percent_at_most():
    state = {}
    sizes = [float(limited(torch.full((4,), v), state).norm()) for v in (1.0, 5.0, 0.5, 0.504)]
    assert sizes == pytest.approx([2.0, 2.02, 1.0, 1.008])


@pytest.mark.parametrize("name", ["galore", "fira", "apollo"])
def test_it_trains(name, text):
    from layerwise.models.model import build
    from layerwise.models.spec import model_spec

    model = build(
        model_spec({"embedding": {"vocab": text.vocab}, "stack": {"depth": 2, "width": 32, "layer": {"heads": 2, "causal": True}}}), 0
    )
    spec = TrainSpec("causal-lm", steps=30, batch=8, optimizer=OptimizerSpec(name, 1e-2, options={"rank": 4}), log_every=1)
    first = train(model, text, TrainSpec("causal-lm", steps=1, batch=8, optimizer=spec.optimizer)).findings.metrics["train_loss"]
    assert train(model, text, spec).findings.metrics["train_loss"] < first - 0.5
    with pytest.raises(BadInput, match="rank and gap"):
        GaLore([torch.nn.Parameter(torch.zeros(2, 2))], rank=0)
