"""Masking: what is never chosen, what the labels are, the rates, and that one batch is never without a label."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.data.masking import mask_tokens

VOCAB, MASK = 50, 3
SPECIAL = torch.arange(6)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _mask(ids, seed=0, **options):
    return mask_tokens(ids, **{"mask_id": MASK, "vocab": VOCAB, "special_ids": SPECIAL, "generator": _generator(seed), **options})


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 12),
    rate=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    padded=st.booleans(),
)
def test_what_is_chosen_and_what_the_labels_are(rows, length, rate, seed, padded):
    ids = torch.randint(0, VOCAB, (rows, length), generator=_generator(seed))
    given_ids, attention = ids.clone(), None
    real = torch.ones_like(ids).bool()
    if padded:
        real = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=_generator(seed + 1))
        attention = real.long()
    hidden, labels = _mask(ids, seed, rate=rate, attention_mask=attention)
    assert torch.equal(ids, given_ids), "the batch itself is not written to"
    chosen, ordinary = labels != -100, (ids >= 6) & real
    assert not (chosen & ~ordinary).any()
    assert torch.equal(labels[chosen], ids[chosen]) and (labels[~chosen] == -100).all()
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert chosen.any() == ordinary.any(), "one label at least wherever there is an ordinary token"
    assert hidden.min() >= 0 and hidden.max() < VOCAB
    again = _mask(ids, seed, rate=rate, attention_mask=attention)
    assert torch.equal(again[0], hidden) and torch.equal(again[1], labels)


def _within(found, expected, n, sigmas=5):
    assert found == pytest.approx(expected, abs=sigmas * (expected * (1 - expected) / n) ** 0.5)


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.4])
@pytest.mark.parametrize("replace", [(0.8, 0.1, 0.1), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.3, 0.2)])
def test_rates(rate, replace):
    ids = torch.randint(6, VOCAB, (200, 500), generator=_generator(2))
    hidden, labels = _mask(ids, 7, rate=rate, replace=replace)
    chosen = labels != -100
    n = int(chosen.sum())
    _within(n / ids.numel(), rate, ids.numel())
    masked, same = (hidden[chosen] == MASK), (hidden[chosen] == ids[chosen])
    # A random token is the mask, or the token itself, once in the vocabulary.
    by_chance = replace[1] / VOCAB
    _within(float(masked.float().mean()), replace[0] + by_chance, n)
    _within(float(same.float().mean()), replace[2] + by_chance, n)
    noise = hidden[chosen][~masked & ~same]
    if replace[1]:
        counts = noise.bincount(minlength=VOCAB).float()
        counts = counts[torch.arange(VOCAB) != MASK]
        # Ordinary tokens lose the 1 in 44 draws that left them as they were.
        assert (counts - n * by_chance).abs().max() < 5 * (n * by_chance) ** 0.5 + n * by_chance / 44
    else:
        assert not len(noise)


def test_choice_is_even_over_positions():
    ids = torch.full((4000, 10), 9)
    chosen = (_mask(ids, 3, rate=0.3)[1] != -100).float()
    assert (chosen.mean(0) - 0.3).abs().max() < 5 * (0.3 * 0.7 / 4000) ** 0.5
    pairs = (chosen[:, :-1] * chosen[:, 1:]).mean()
    assert pairs == pytest.approx(0.09, abs=0.01), "neighbours are drawn apart"


def test_a_batch_without_ordinary_tokens_has_no_label():
    ids = torch.tensor([[0, 1, 5]])
    hidden, labels = _mask(ids, rate=1.0)
    assert torch.equal(hidden, ids) and (labels == -100).all()
    only = torch.tensor([[0, 30, 5]])
    for seed in range(20):
        assert _mask(only, seed, rate=0.0)[1].tolist() == [[-100, 30, -100]]


def test_without_a_generator_the_global_one_decides():
    ids = torch.randint(6, VOCAB, (8, 32), generator=_generator(0))
    made = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        made.append(_mask(ids, generator=None)[0])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
