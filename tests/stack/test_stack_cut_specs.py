"""A stack's spec after surgery says what the stack is, also where the layers, norms and position biases are of several kinds."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import BadInput
from layerwise.stack.context import Context
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import LayerSpec, StackSpec, indices
from layerwise.stack.stack import Stack
from layerwise.stack.surgery import insert, keep, repeat, replace

X = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _stack(depth=4, overrides=None, seed=0, **layer):
    stack = Stack(StackSpec(depth, 24, LayerSpec(**{"heads": 4, **layer}), overrides or {}, init_std=0.3))
    stack.initialize(torch.Generator().manual_seed(seed))
    return stack.double().eval()


def _rebuilt(stack):
    """Another stack from the spec alone, with the weights of the first."""
    twin = Stack(stack.spec).double().eval()
    twin.load_state_dict(stack.state_dict())
    return twin


LAYERS = st.one_of(
    st.builds(
        dict,
        heads=st.just(2),
        kv_heads=st.sampled_from([1, 2]),
        parallel=st.booleans(),
        placement=st.sampled_from(["pre", "lns", "sandwich"]),
    ),
    st.builds(dict, heads=st.just(3), kv_heads=st.sampled_from([1, 3]), norm=st.sampled_from(["layernorm", "rmsnorm"])),
    st.builds(dict, heads=st.just(4), kv_heads=st.sampled_from([1, 2, 4]), placement=st.sampled_from(["post", "deepnorm"])),
    st.builds(dict, position=st.just("rotary"), rotary_dim=st.sampled_from([None, 2, 6]), norm_eps=st.sampled_from([1e-6, 1e-3])),
    st.builds(dict, head_dim=st.sampled_from([2, 5]), heads=st.sampled_from([5, 7]), ffn_width=st.integers(1, 9)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LAYERS, min_size=1, max_size=9), st.sampled_from(["rmsnorm", "layernorm"]))
def test_any_possible_layers_make_a_possible_spec(layers, final):
    """Also where the most common value of every field, put together, would be no possible layer."""
    made = [LayerSpec(**layer).resolve(i, len(layers), 24) for i, layer in enumerate(layers)]
    base = StackSpec(2, 24, LayerSpec(norm=final, norm_eps=1e-4, norm_bias=False))
    spec = base.with_layers(made)
    assert list(spec.layers) == made
    assert (spec.layer.norm, spec.layer.norm_eps, spec.layer.norm_bias) == (final, 1e-4, False), "the final norm stays of its kind"
    assert spec.with_layers(spec.layers) == spec


def test_alike_layers_are_said_once():
    spec = StackSpec(6, 24, LayerSpec(heads=4), {"2": {"window": 3}, "3": {"ffn_width": 9}})
    again = spec.with_layers(spec.layers)
    assert again.overrides == {"2": {"window": 3}, "3": {"ffn_width": 9}}


@pytest.mark.parametrize("cut", [lambda s: keep(s, [0, 1]), lambda s: keep(s, [3]), lambda s: keep(s, []), lambda s: repeat(s, [3, 0, 3])])
@pytest.mark.parametrize("last", [{"norm": "layernorm"}, {"norm": "rmsnorm_zero"}, {"norm_eps": 0.5}])
def test_the_final_norm_of_a_cut_is_the_one_it_had(cut, last):
    for overrides, layer in (({"-1": last}, {}), ({"0:3": last}, {}), ({"0:3": {"norm": "rmsnorm", "norm_eps": 1e-6}}, last)):
        stack = _stack(overrides=overrides, **layer)
        made = cut(stack)
        assert made.norm is stack.norm
        assert torch.equal(_rebuilt(made)(X), made(X))


def test_the_final_norm_is_of_the_stacks_kind_whatever_its_last_layer_is():
    stack = _stack(overrides={"-1": {"norm": "layernorm"}})
    assert isinstance(stack.norm, torch.nn.RMSNorm) and isinstance(stack.layers[-1].ffn.norm, torch.nn.LayerNorm)
    new = replace(stack, 3, _stack(1, norm="layernorm", norm_bias=False).layers[0])
    assert torch.equal(_rebuilt(new)(X), new(X))


def test_a_relative_bias_goes_with_the_last_layer_that_needs_it():
    stack = _stack(overrides={"1": {"position": "relative"}})
    kept, gone = keep(stack, [0, 1]), keep(stack, [0, 2])
    assert kept.relative is stack.relative and gone.relative is None
    for made, path in ((kept, [0, 1]), (gone, [0, 2])):
        assert torch.equal(_rebuilt(made)(X), made(X)) and torch.equal(made(X), stack(X, Context(path=path)))


def test_a_layer_that_needs_a_relative_bias_goes_only_where_there_is_one():
    relative = _stack(1, position="relative").layers[0]
    with pytest.raises(BadInput, match="needs the stack's bias for 4 heads; it has none"):
        insert(_stack(), 1, [relative])
    with pytest.raises(BadInput, match="for 4 heads; it has one for 2 heads"):
        _stack(1, position="relative", heads=2).with_layers([relative])
    there = _stack(2, position="relative")
    made = insert(there, 1, [relative])
    assert torch.equal(_rebuilt(made)(X), made(X))


@pytest.mark.parametrize(
    ("layer", "overrides", "sizes", "message"),
    [
        ({}, {"1": {"heads": 2}}, {}, "heads and causal must agree"),
        ({"causal": True}, {"1": {"causal": False}}, {}, "heads and causal must agree"),
        ({}, {}, {"buckets": 3}, "need 4 buckets or more"),
        ({"causal": True}, {}, {"buckets": 1}, "need 2 buckets or more"),
        ({}, {}, {"buckets": 32, "max_distance": 8}, "max_distance above 8"),
        ({"causal": True}, {}, {"buckets": 32, "max_distance": 16}, "max_distance above 16"),
    ],
)
def test_a_shared_relative_bias_that_cannot_work_is_refused(layer, overrides, sizes, message):
    with pytest.raises(BadInput, match=message):
        StackSpec(3, 24, LayerSpec(position="relative", **layer), overrides, **sizes)
    StackSpec(3, 24, LayerSpec(position="rotary", head_dim=4, **layer), overrides, **sizes)


@pytest.mark.parametrize("causal", [True, False])
def test_the_smallest_relative_bias_that_is_allowed_works(causal):
    buckets = 2 if causal else 4
    stack = Stack(StackSpec(1, 24, LayerSpec(position="relative", causal=causal), buckets=buckets, max_distance=2))
    stack.initialize(torch.Generator().manual_seed(0))
    made = stack.double()(X)
    assert made.isfinite().all() and stack.relative.weight.shape == (buckets, 4)
    (made * X).sum().backward()
    # T5 counts "ahead, at distance 0" as a bucket, in which nothing can be.
    used = [0, 1] if causal else [0, 1, 3]
    assert (stack.relative.weight.grad != 0).any(dim=1).nonzero().flatten().tolist() == used


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "deepnorm", "lns"])
def test_a_scale_of_zero_is_a_scale(placement):
    spec = LayerSpec(heads=2, placement=placement, norm_gain=0.0, residual_scale=0.0).resolve(3, 6, 8)
    assert spec.norm_gain == 0.0 and spec.residual_scale == 0.0
    stack = _stack(2, placement=placement, norm_gain=0.0)
    assert not any(layer.ffn.norm.weight.any() for layer in stack.layers)
    x = stack.layers[0].mixer(X, _begun(X), (0, 0))
    assert torch.equal(x, torch.zeros_like(X) if placement in ("post", "deepnorm") else X)


def _begun(x):
    ctx = Context()
    ctx.begin(x, None)
    return ctx


@pytest.mark.parametrize("key", ["-:2", "1:-", "-:-", "::-", ":-:", "--1", "1 :2"])
def test_a_lone_minus_is_no_bound(key):
    with pytest.raises(BadInput, match="neither an index nor a slice"):
        indices(key, 4)


def test_an_adapters_dropout_is_a_probability():
    with pytest.raises(BadInput, match=r"dropout is a probability"):
        LinearSpec("lora", rank=2, dropout=1.5)
    with pytest.raises(BadInput, match="rank >= 1"):
        LinearSpec("lora")


def test_deep_copies_and_surgery_on_surgery_stay_true():
    stack = _stack(5, {"::2": {"placement": "post"}, "1": {"kv_heads": 2}, "3": {"norm": "layernorm"}})
    made = replace(keep(repeat(stack, [4, 1, 1, 3, 0]), [1, 2, 3, 4]), 0, stack.layers[2])
    assert [s.placement for s in made.spec.layers] == ["post", "pre", "pre", "post"]
    assert torch.equal(_rebuilt(made)(X), made(X)) and torch.equal(made(X), stack(X, Context(path=[2, 1, 3, 0])))
    assert dataclasses.replace(made.spec) == made.spec
