"""Scores of groups of coupled weights, against loops over them."""

from typing import get_args

import pytest
import torch

import layerwise as lw
from layerwise.analyze.groups import GroupScore, group_scores
from layerwise.analyze.importance import input_magnitudes, neuron_importance
from layerwise.errors import BadInput
from layerwise.objectives.language import CausalLM
from layerwise.stack.record import inputs_of

LAYER = {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 4, "kv_heads": 2, "ffn_width": 12}


def _model(**layer):
    model = lw.load("decoder", seed=1, embedding={"vocab": 262}, stack={"depth": 2, "width": 32, "layer": LAYER | layer})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def _by_hand(model, value):
    """Score of each layer's groups and channels by a loop; `value` gives a number for every weight of a parameter."""
    groups, ffn = [], []
    for layer in model.stack.layers:
        a, f, spec = layer.mixer.branch, layer.ffn.branch, layer.spec
        share, size = spec.heads // spec.kv_heads, spec.head_dim
        group = torch.zeros(spec.kv_heads)
        for h in range(spec.heads):
            rows = slice(h * size, (h + 1) * size)
            group[h // share] += value(a.q.weight)[rows].sum() + value(a.o.weight)[:, rows].sum()
        for g in range(spec.kv_heads):
            rows = slice(g * size, (g + 1) * size)
            group[g] += value(a.k.weight)[rows].sum() + value(a.v.weight)[rows].sum()
        groups.append(group)
        ffn.append(
            torch.stack(
                [
                    value(f.gate.weight)[j].sum() + value(f.up.weight)[j].sum() + value(f.down.weight)[:, j].sum()
                    for j in range(spec.ffn_width)
                ]
            )
        )
    return groups, ffn


def test_adapt_pruner_6_taylor_sums_gradients_over_batches_before_the_absolute_value(text):
    model = _model()
    found = group_scores(model, text, "taylor", samples=8, batch=8)
    rows = text.train.batch(torch.arange(8))
    CausalLM()(model, rows, torch.Generator()).mean.backward()
    groups, ffn = _by_hand(model, lambda w: (w.detach() * w.grad).abs())
    for ours, theirs in zip([*found.groups, *found.ffn], [*groups, *ffn], strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-7)
    model.zero_grad(set_to_none=True)
    # Two batches: |sum of gradients|, which is less than the sum of absolute values.
    two = group_scores(model, text, "taylor", samples=16, batch=8)
    blocks = -(-len(text.train) // 8)
    parts = [torch.arange(8) + 8 * (i * blocks // 2) for i in range(2)]
    absolute = torch.zeros(12)
    for i, rows in enumerate(parts):
        CausalLM()(model, text.train.batch(rows), torch.Generator()).mean.backward()
        absolute += _by_hand(model, lambda w: (w.detach() * w.grad).abs())[1][0] / 2
        if i == 0:
            model.zero_grad(set_to_none=True)
    CausalLM()(model, text.train.batch(parts[0]), torch.Generator()).mean.backward()  # now the gradients of both
    both = _by_hand(model, lambda w: (w.detach() * w.grad / 2).abs())[1][0]
    torch.testing.assert_close(two.ffn[0].float(), both, rtol=1e-4, atol=1e-7)
    assert (two.ffn[0] < 0.999 * absolute).all()


def test_magnitude_is_the_norm_of_the_coupled_weights(text):
    model = _model()
    groups, ffn = _by_hand(model, lambda w: w.detach().square())
    found = group_scores(model, text, "magnitude")
    for ours, theirs in zip([*found.groups, *found.ffn], [*groups, *ffn], strict=True):
        torch.testing.assert_close(ours.float(), theirs.sqrt())
    with torch.no_grad():
        model.stack.layers[1].ffn.branch.down.weight[:, 7] *= 100
        model.embedding.tokens.weight[:, 3] *= 100
    found = group_scores(model, text, "magnitude")
    assert found.ffn[1].argmax() == 7 and found.stream.argmax() == 3


def test_biases_and_gains_belong_to_their_groups(text):
    model = _model(qkv_bias=True, ffn_bias=True, head_scale="before")
    before = group_scores(model, text, "magnitude")
    with torch.no_grad():
        model.stack.layers[0].mixer.branch.q.bias[16:24] = 100.0  # query head 2 reads key/value head 1
        model.stack.layers[0].ffn.branch.up.bias[4] = 100.0
        model.stack.layers[1].mixer.branch.head_scale.weight[1] = 100.0
    after = group_scores(model, text, "magnitude")
    assert (after.groups[0] - before.groups[0] > 50).tolist() == [False, True]
    assert (after.groups[1] - before.groups[1] > 50).tolist() == [True, False]
    assert (after.ffn[0] - before.ffn[0]).argmax() == 4


def test_scores_have_one_number_a_group_and_random_is_the_seeds(text):
    model = _model()
    for by in get_args(GroupScore):
        found = group_scores(model, text, by, samples=8)
        assert found.stream.shape == (32,) and [len(g) for g in found.groups] == [2, 2] and [len(f) for f in found.ffn] == [12, 12]
        assert all((t >= 0).all() and t.any() for t in (found.stream, *found.groups, *found.ffn))
    assert torch.equal(found.ffn[0], group_scores(model, text, "random").ffn[0])
    assert not torch.equal(found.ffn[0], group_scores(model, text, "random", seed=1).ffn[0])
    assert torch.equal(group_scores(model, text, "activation", samples=8).ffn[1], neuron_importance(model, text, samples=8).ffn[1])
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(BadInput, match="groups are scored by"):
        group_scores(model, text, "taste")
    with pytest.raises(BadInput, match="frozen or packed"):
        group_scores(model.requires_grad_(False), text, "taylor")


def test_the_table_says_how_the_scores_are_spread(text):
    found = lw.analyze.group_importance(_model(), text, samples=8)
    assert [row[:2] for row in found.tables[0].rows] == [[0, 2], [1, 2]] and 0.5 <= found.metrics["upper_half_share"] <= 1
    scores = group_scores(_model(), text, "taylor", samples=8)
    assert found.matrices[0].values == [g.tolist() for g in scores.groups]


def test_input_magnitudes_are_means_over_real_positions(text):
    model = _model()
    ids = text.train.batch(torch.arange(3))["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    read = {"q": model.stack.layers[0].mixer.branch.q, "down": model.stack.layers[1].ffn.branch.down}
    seen = {}
    with inputs_of(read, seen.__setitem__), torch.no_grad():
        model({"input_ids": ids, "attention_mask": mask})
    found = input_magnitudes(model, read, [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:]}])
    for name, x in seen.items():
        torch.testing.assert_close(found[name], x[mask.bool()].double().abs().mean(dim=0))
