"""GaLore, Fira and APOLLO: equal to their formulas step by step, small states, limits that must hold."""

import json
from pathlib import Path

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
    return state["m"] / (state["v"].sqrt() + EPS)


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
            rest = (g - 0.25 * basis @ small) * (adapted.norm(dim=0) / small.norm(dim=0))
            if last is not None and rest.norm() > 1.01 * last:
                rest = rest * (1.01 * last / rest.norm())
            last = rest.norm()
        update = 0.25 * update + (rest if kind is Fira else 0)
        size = 0.1 * (1 - BETAS[1] ** (t + 1)) ** 0.5 / (1 - BETAS[0] ** (t + 1))
        expected -= size * (update if shape[0] <= shape[1] else update.T)
        w.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(w.detach(), expected, rtol=1e-6, atol=1e-7)


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


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("name", ["galore", "fira", "apollo", "apollo-mini"])
def test_four_steps_are_those_of_the_published_code(name, shape, monkeypatch):
    """Gradients and APOLLO's projection by formula, so that both sides have the same; rank 2.

    Projections are renewed after 2 steps where they stand on the left: the moments of before meet whatever sign the new singular
    vectors have, and for tall matrices that sign depends on which way the matrix is handed to LAPACK.
    """
    monkeypatch.setattr(APOLLO, "_sketch", lambda self, g, *_: torch.cos(torch.arange(2 * len(g)) * 1.7 + 0.3).view(2, -1))
    weight = torch.nn.Parameter(torch.zeros(shape))
    kinds = {"galore": (GaLore, {"scale": 0.25}), "fira": (Fira, {"scale": 0.25}), "apollo": (APOLLO, {"scale": 2.0})}
    kind, options = kinds.get(name, (APOLLO, {"scale": 4.0, "scope": "tensor"}))
    optimizer = kind([weight], 0.1, rank=2, gap=2 if shape[0] < shape[1] else 4, **options)
    for t in range(4):
        weight.grad = (torch.sin(torch.arange(weight.numel()) ** 2 * 0.13 * (t + 1) + 0.1 * t) * (1 + t)).view(shape)
        optimizer.step()
    golden = json.loads((Path(__file__).parents[1] / "golden" / "lowrank_optimizers.json").read_text())
    torch.testing.assert_close(weight.detach().flatten()[:4], torch.tensor(golden[f"{name} {shape[0]}x{shape[1]}"]), rtol=1e-4, atol=2e-5)
