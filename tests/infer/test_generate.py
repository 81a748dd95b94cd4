"""Continuing texts."""

import pytest
import torch

from layerwise.errors import BadInput
from layerwise.infer.generate import generate, sample
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec


def _model(**layer):
    data = preset("decoder")
    data["stack"] |= {"depth": 3, "width": 16, "init_std": 0.3}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    data["embedding"] = {"vocab": 40}
    return build(model_spec(data)).double().eval()


IDS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize("layer", [{}, {"kv_heads": 1, "window": 3}, {"position": "alibi"}, {"position": "relative"}])
@pytest.mark.parametrize("path", [None, [0, 1, 1, 2], [0, 2]])
def test_greedy_with_cache_equals_recomputing_everything(layer, path):
    model = _model(**layer)
    ids = IDS
    for _ in range(12):
        ids = torch.cat([ids, model({"input_ids": ids}, path=path).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, IDS, new=12, path=path), ids)


def test_left_padding_changes_nothing():
    model = _model()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    assert torch.equal(generate(model, padded, new=8, attention_mask=mask)[:, 3:], generate(model, IDS, new=8))


def test_stop_fills_the_row_and_ends_when_all_stopped():
    model = _model()
    free = generate(model, IDS, new=10)
    stop = int(free[0, 7])
    made = generate(model, IDS, new=10, stop=stop)
    row = made[0, 5:].tolist()
    assert row[row.index(stop) :] == [stop] * (len(row) - row.index(stop))
    assert generate(model, IDS[:1], new=10, stop=stop).shape[1] <= 8


def test_sampling_follows_the_seed_and_the_distribution():
    model = _model()
    a, b, c = (generate(model, IDS, new=20, temperature=1.0, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    generator = torch.Generator().manual_seed(0)
    draws = sample(logits.expand(20000, 4), 0.7, 1.0, generator)
    share = torch.bincount(draws, minlength=4) / 20000
    torch.testing.assert_close(share, (logits / 0.7).softmax(-1)[0], rtol=0, atol=0.015)


def test_top_p_keeps_the_smallest_set_that_exceeds_it():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(5000, 4)
    for p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2})):
        assert set(sample(logits, 1.0, p, torch.Generator().manual_seed(1)).tolist()) == kept


def test_refusals():
    with pytest.raises(BadInput, match="causal"):
        generate(_model(causal=False), IDS)
    with pytest.raises(BadInput, match="length >= 1"):
        generate(_model(), IDS[:, :0])
    with pytest.raises(BadInput, match="path"):
        generate(_model(), IDS, path=[0, 7])
