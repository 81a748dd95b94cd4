"""Weights between two networks, by depth: the ends, the line, networks of other libraries, and what is refused."""

import copy

import pytest
import torch

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.models.checkpoint import save
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec


def _ours(seed, depth=3):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 16}
    return build(model_spec(data | {"embedding": {"vocab": 30}}), seed)


def _foreign(seed):
    import transformers as t

    torch.manual_seed(seed)
    return t.FalconForCausalLM(t.FalconConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=3, vocab_size=40))


@pytest.mark.parametrize("make", [_ours, _foreign])
def test_lambda_goes_linearly_from_the_first_layer_to_the_last(make):
    one, two = make(0), make(1)
    kept = copy.deepcopy(one.state_dict())
    mixed = lw.edit.interpolate(one, other=two, weight=0.2, top=0.8)
    depths, after = lw.depth_of(one), dict(two.named_parameters())
    by_depth = {-1: 0.2, 0: 0.2, 1: 0.5, 2: 0.8, 3: 0.8}
    for name, p in mixed.named_parameters():
        before = kept[name]
        torch.testing.assert_close(p.detach(), before + by_depth[depths[name]] * (after[name].detach() - before))
    assert all(torch.equal(t, kept[n]) for n, t in one.state_dict().items()), "the given network stays as it was"


@pytest.mark.parametrize("make", [_ours, _foreign])
def test_the_ends_are_the_two_networks_and_the_middle_their_mean(make):
    one, two = make(0), make(1)
    for weight, expected in ((0.0, one), (1.0, two)):
        for a, b in zip(lw.edit.interpolate(one, other=two, weight=weight).parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    mean = lw.edit.interpolate(one, other=two)
    for m, a, b in zip(mean.parameters(), one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(m, (a + b) / 2)


def test_a_folder_is_read_and_other_shapes_are_refused(tmp_path):
    one, two = _ours(0), _ours(1)
    folder = str(save(two, tmp_path / "two"))
    assert torch.equal(lw.edit.interpolate(one, other=folder, weight=1.0).head.weight, two.head.weight)
    with pytest.raises(BadInput, match=r"stack\.layers\.2\..* is not the same in both"):
        lw.edit.interpolate(one, other=_ours(0, depth=2))
