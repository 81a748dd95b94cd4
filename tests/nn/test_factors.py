"""Two thin matrices in place of one: what is lost is what theory says, and no other pair loses less."""

import pytest
import torch

from layerwise.nn.linears.factors import activation_scales, svd_factors


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_what_is_lost_is_the_singular_values_left_out(weight: torch.Tensor) -> None:
    b, a = svd_factors(weight, 5)
    assert b.shape == (12, 5)
    assert a.shape == (5, 20)
    lost = torch.linalg.svdvals(weight)[5:].square().sum()
    torch.testing.assert_close((weight - b @ a).square().sum(), lost)


def test_of_full_rank_nothing_is_lost(weight: torch.Tensor) -> None:
    for scales in (None, torch.rand(20, generator=torch.Generator().manual_seed(1)) + 0.1):
        b, a = svd_factors(weight, 12, scales)
        torch.testing.assert_close(b @ a, weight)


def test_equal_scales_are_no_scales(weight: torch.Tensor) -> None:
    b, a = svd_factors(weight, 5)
    d, c = svd_factors(weight, 5, torch.full((20,), 3.0))
    torch.testing.assert_close(d @ c, b @ a)


def test_scales_decide_what_is_nearest(weight: torch.Tensor) -> None:
    """The scaled error is the smallest possible: below that of the plain factors and of any nearby pair, and as Eckart and Young say."""
    scales = activation_scales(torch.rand(20, generator=torch.Generator().manual_seed(1)) * 4).double()
    b, a = svd_factors(weight, 5, scales)

    def lost(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return ((weight - b @ a) * scales).square().sum()

    torch.testing.assert_close(lost(b, a), torch.linalg.svdvals(weight * scales)[5:].square().sum())
    assert lost(b, a) < lost(*svd_factors(weight, 5))
    nudge = torch.Generator().manual_seed(2)
    for _ in range(20):
        moved = [t + 0.01 * torch.randn(t.shape, generator=nudge, dtype=t.dtype) for t in (b, a)]
        assert lost(b, a) < lost(*moved)


def test_a_matrix_is_decomposed_once_for_all_ranks_and_bit_for_bit_as_anew(weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    made, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *given, **more: made.append(1) or svd(*given, **more))
    scales, kept = torch.rand(20, generator=torch.Generator().manual_seed(1)) + 0.1, {}
    for other in (None, scales):
        for rank in (9, 5, 1):
            for a, b in zip(svd_factors(weight, rank, other, kept), svd_factors(weight, rank, other), strict=True):
                assert torch.equal(a, b)
    assert len(made) == 2 + 6  # one for each scaling, and six anew
    svd_factors(weight.clone(), 9, None, kept)
    assert len(made) == 8
    # A higher rank, another matrix, the same numbers in another shape and in another type are not among them.
    whole = weight.round()
    others = (weight, 10), (weight + 1, 9), (weight.reshape(-1, 2 * weight.shape[1]), 6), (whole, 9), (whole.float(), 9)
    for matrix, rank in others:
        assert svd_factors(matrix, rank, None, kept)[0].shape[1] == rank
    assert len(made) == 8 + len(others)
