"""Growing in depth: the papers' index maps, exact preservation of outputs, independence of copies."""

import pytest
import torch

import layerwise as lw
from layerwise.edit import PREVIEWS
from layerwise.edit.growth import sources, spread
from layerwise.errors import BadInput
from layerwise.table import lookup


def _model(depth=4, **layer):
    model = lw.load("decoder", seed=1, embedding={"vocab": 50}, stack={"depth": depth, "width": 32, "layer": {**BASE, **layer}})
    with torch.no_grad():  # weights large enough that every layer matters
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.2)
    return model.eval()


BASE = {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 4}
IDS = {"input_ids": torch.arange(24).reshape(2, 12) % 50}


def test_the_interpolation_map_is_the_papers():
    # Apollo's card, check 1, and the examples of its published code.
    assert sources(3, 8, "interpolate") == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sources(6, 9, "interpolate") == [0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert sources(3, 6, "interpolate") == [0, 0, 1, 1, 2, 2]
    for n in range(1, 13):
        for m in range(n, 25):
            chosen = sources(n, m, "interpolate")
            counts = [chosen.count(i) for i in range(n)]
            assert chosen == sorted(chosen) and chosen[0] == 0 and max(counts) - min(counts) <= 1 and min(counts) >= 1
            assert chosen == [int(t * n / m) for t in range(m)]
        assert sources(n, n, "interpolate") == list(range(n))


def test_stacking_repeats_the_stack_and_a_part_of_it_is_its_upper_part():
    assert sources(3, 6, "stack") == [0, 1, 2, 0, 1, 2]
    # Golden: stack_meta_layer(3, 8) of yuanyehome/Apollo-AAAI-2024-Release at 50f9f39.
    assert sources(3, 8, "stack") == [0, 1, 2, 0, 1, 2, 1, 2]
    assert sources(4, 6, "top") == [0, 1, 2, 3, 3, 3]
    assert sources(4, 6, "middle") == [0, 1, 1, 2, 2, 3]
    assert sources(2, 4, "append") == [0, 1, None, None]


@pytest.mark.parametrize("placement", ["pre", "lns", "sandwich"])
@pytest.mark.parametrize("where", ["interpolate", "stack", "top", "middle", "append"])
def test_silent_layers_keep_the_outputs_to_the_bit(placement, where):
    model = _model(placement=placement)
    grown = lw.edit.grow(model, depth=7, where=where, silent=True).eval()
    assert grown.stack.depth == 7 and model.stack.depth == 4
    assert torch.equal(grown(IDS).logits, model(IDS).logits)
    # They are not dead: gradients reach what they write.
    grown(IDS).logits.square().mean().backward()
    assert all(any(p.grad is not None and p.grad.any() for p in layer.parameters()) for layer in grown.stack.layers)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm_zero"])
def test_silence_needs_no_special_norm_or_missing_bias(norm):
    for placement in ("pre", "sandwich"):
        model = _model(norm=norm, placement=placement, out_bias=True, ffn_bias=True)
        assert torch.equal(lw.edit.grow(model, order=[0, 0, 1, 2, None, 3], silent=True)(IDS).logits, model(IDS).logits)


def test_growing_by_interpolation_equals_the_unrolled_shallow_model():
    # Apollo's card, check 2: after copying, the deep model is the old one run along the same map.
    model = _model(3)
    for where in ("interpolate", "stack"):
        grown = lw.edit.grow(model, depth=8, where=where)
        assert torch.equal(grown(IDS).logits, model(IDS, path=sources(3, 8, where)).logits)


def test_copies_part_in_training_and_the_first_stays_shared():
    model = _model(2)
    grown = lw.edit.grow(model, depth=4)
    assert grown.stack.layers[0] is model.stack.layers[0] and grown.stack.layers[2] is model.stack.layers[1]
    pointers = [p.data_ptr() for layer in grown.stack.layers for p in layer.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_growing_in_place_does_not_overwrite_what_it_copies_from():
    # Apollo's card, check 6: three layers a, b, c in room for six become a a b b c c.
    model = _model(6)
    with torch.no_grad():
        for i, layer in enumerate(model.stack.layers):
            for parameter in layer.parameters():
                parameter.fill_(float(i))
    spread(model.stack.layers, 3, 6, "interpolate")
    assert [next(layer.parameters()).mean().item() for layer in model.stack.layers] == [0, 0, 1, 1, 2, 2]
    spread(model.stack.layers, 2, 6, "append")
    assert [next(layer.parameters()).mean().item() for layer in model.stack.layers] == [0, 0, 1, 1, 2, 2]


def test_fresh_layers_have_initial_weights_scaled_for_the_new_depth():
    model = lw.load("decoder", embedding={"vocab": 50}, stack={"depth": 2, "width": 64, "scaled_init": True, "layer": BASE})
    grown = lw.edit.grow(model, depth=8, where="append", seed=3)
    down = grown.stack.layers[5].ffn.branch.down.weight
    assert down.std().item() == pytest.approx(0.02 * 16**-0.5, rel=0.1)
    again = lw.edit.grow(model, depth=8, where="append", seed=3)
    other = lw.edit.grow(model, depth=8, where="append", seed=4)
    assert torch.equal(again.stack.layers[5].ffn.branch.down.weight, down)
    assert not torch.equal(other.stack.layers[5].ffn.branch.down.weight, down)


def test_the_preview_is_the_spec_of_the_grown_model():
    model = _model(4)
    for options in ({"depth": 7, "where": "stack"}, {"depth": 6, "where": "append"}, {"order": [0, 2, None]}):
        preview = lookup(PREVIEWS, "grow", "preview")(model.spec, **options)
        assert preview == lw.edit.grow(model, **options).spec


def test_layers_that_differ_keep_their_kind():
    spec = {"depth": 3, "width": 32, "layer": BASE, "overrides": {"1": {"window": 4}}}
    model = lw.load("decoder", embedding={"vocab": 50}, stack=spec)
    assert [s.window for s in lw.edit.grow(model, depth=6).spec.stack.layers] == [None, None, 4, 4, None, None]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either depth or order"),
        ({"depth": 3}, "greater depth"),
        ({"depth": 9, "where": "middle"}, "up to depth 8"),
        ({"order": [0, 4]}, "layers 0 to 3"),
        ({"order": [1, 0, 2, 3], "silent": True}, "every old layer must come once"),
        ({"order": [0, 1, 2], "silent": True}, "every old layer must come once"),
    ],
)
def test_impossible_growth_is_refused(options, words):
    with pytest.raises(BadInput, match=words):
        lw.edit.grow(_model(), **options)


def test_post_norm_layers_cannot_be_silent():
    with pytest.raises(BadInput, match="placement pre"):
        lw.edit.grow(_model(placement="post"), depth=6, silent=True)


def test_initialize_draws_what_build_draws():
    model = _model()
    fresh = lw.edit.initialize(model, seed=1)
    built = lw.load("decoder", seed=1, embedding={"vocab": 50}, stack={"depth": 4, "width": 32, "layer": BASE})
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), built.parameters(), strict=True))
