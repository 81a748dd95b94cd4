"""GaLore: Adam where the subspace is everything, a low-rank step where it is not, and the state the paper counts."""

import pytest
import torch

from layerwise.analyze.ledger import state_floats
from layerwise.errors import BadInput
from layerwise.optim.lowrank import GaLore


def _steps(optimizer, weight, n=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        optimizer.step()


def test_a_rank_that_leaves_nothing_out_is_adam():
    start = torch.randn(6, 8, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    _steps(GaLore([ours], lr=0.01, rank=6), ours)
    _steps(torch.optim.Adam([theirs], lr=0.01), theirs)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)  # eps stands in another place


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_a_step_lies_in_the_top_singular_directions_and_is_adam_of_the_projected_gradient(shape):
    start = torch.randn(shape, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    optimizer = GaLore([weight], lr=0.01, rank=2, scale=0.25)
    weight.grad = torch.randn(shape, dtype=torch.float64)
    optimizer.step()
    u, _, vh = torch.linalg.svd(weight.grad.float(), full_matrices=False)
    u, v = u[:, :2].double(), vh[:2].double().t()
    # Adam's first step is the sign.
    expected = u @ (u.t() @ weight.grad).sign() if shape[0] <= shape[1] else (weight.grad @ v).sign() @ v.t()
    torch.testing.assert_close(start - weight.detach(), 0.01 * 0.25 * expected, atol=1e-6, rtol=1e-4)
    assert torch.linalg.matrix_rank(start - weight.detach(), rtol=1e-6) == 2


def test_the_subspace_is_kept_for_gap_steps_and_state_is_what_the_paper_counts():
    weight = torch.nn.Parameter(torch.randn(6, 8))
    optimizer = GaLore([weight], rank=2, gap=3)
    seen = []
    for _ in range(6):
        _steps(optimizer, weight, 1)
        weight.grad = None
        seen.append(optimizer.state[weight]["basis"].clone())
    assert all(torch.equal(seen[i], seen[i - 1]) for i in (1, 2, 4, 5))
    assert state_floats(optimizer) == 2 * 2 * 8 + 2 * 6


def test_bad_options_are_refused():
    with pytest.raises(BadInput, match="rank and gap"):
        GaLore([torch.nn.Parameter(torch.ones(2, 2))], rank=0)
