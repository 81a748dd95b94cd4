"""Stack specs: keys are Python's indices and slices, overrides are typed, and a spec says the same after any round trip."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from layerwise.errors import BadInput
from layerwise.models.spec import ModelSpec, model_spec, spec_data
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import LayerSpec, StackSpec, indices

BOUND = st.integers(-12, 12) | st.none()


@given(st.integers(1, 10), BOUND, BOUND, st.integers(-4, 4) | st.none())
def test_a_slice_names_what_python_says(depth, start, stop, step):
    parts = [start, stop] if step is None else [start, stop, step]
    text = ":".join("" if p is None else str(p) for p in parts)
    outside = any(b is not None and not -depth <= b <= depth for b in (start, stop))
    if step == 0 or outside or not list(range(depth))[slice(*parts)]:
        with pytest.raises(BadInput, match=f"slice '{text}'"):
            indices(text, depth)
    else:
        assert list(indices(text, depth)) == list(range(depth))[slice(*parts)]


@given(st.integers(1, 10), st.integers(-12, 12), st.booleans())
def test_an_index_names_what_python_says(depth, index, as_text):
    key = f" {index} " if as_text else index
    if -depth <= index < depth:
        assert list(indices(key, depth)) == [list(range(depth))[index]]
    else:
        with pytest.raises(BadInput, match=rf"layer {index} is out of range: the stack has layers 0 to {depth - 1}"):
            indices(key, depth)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("2:4:0", "step 0"),
        (":9", "slice ':9' is out of range: the stack has layers 0 to 3"),
        ("-5:", "out of range"),
        ("2:2", "names no layer"),
        ("one", "neither an index nor a slice: write 3, -1, '0:3' or '::4'"),
        ("", "neither"),
        ("-", "neither"),
        ("0-3", "neither"),
        ("0:1:1:1", "neither"),
        ("1.5", "neither"),
        ("0,2", "neither"),
    ],
)
def test_what_is_wrong_with_a_key_is_said(key, message):
    with pytest.raises(BadInput, match=message):
        indices(key, 4)
    with pytest.raises(BadInput, match=message):
        StackSpec(4, 16, overrides={key: {"window": 3}})


CHANGE = st.fixed_dictionaries(
    {},
    optional={
        "window": st.none() | st.integers(1, 9),
        "placement": st.sampled_from(["pre", "post", "deepnorm", "lns", "sandwich"]),
        "kv_heads": st.sampled_from([None, 1, 2]),
        "ffn_width": st.none() | st.integers(1, 40),
        "ffn": st.sampled_from(["gelu", "swiglu"]),
        "heads": st.sampled_from([2, 4]),
        "drop": st.floats(0, 0.9),
        "norm_gain": st.none() | st.floats(0.1, 2),
        "rope_scaling": st.none() | st.just({"kind": "linear", "factor": 2.0}),
        "linears": st.dictionaries(st.sampled_from(["q", "up"]), st.fixed_dictionaries({"kind": st.just("lora"), "rank": st.integers(1, 4)}), max_size=2),
    },
)  # fmt: skip


@st.composite
def stacks(draw):
    depth = draw(st.integers(1, 7))
    bounds = st.integers(-depth, depth - 1)
    keys = draw(st.lists(bounds.map(str) | bounds.map(lambda b: f"{b}:") | st.sampled_from(["::2", "::-1", ":"]), max_size=4, unique=True))
    return StackSpec(depth, 16, LayerSpec(placement=draw(st.sampled_from(["pre", "lns", "deepnorm"]))), {k: draw(CHANGE) for k in keys})


@settings(max_examples=40, deadline=None)
@given(stacks())
def test_overrides_apply_in_order_and_the_spec_survives_every_round_trip(spec):
    for i, layer in enumerate(spec.layers):
        for name in ("window", "placement", "drop", "heads", "ffn"):
            value = getattr(spec.layer, name)
            for key, change in spec.overrides.items():
                touched = [list(range(spec.depth))[int(key)]] if ":" not in key else list(indices(key, spec.depth))
                if i in touched:
                    value = change.get(name, value)
            assert getattr(layer, name) == value
        assert layer.resolve(i, spec.depth, spec.width) == layer, "a resolved layer stays as it is"
    again = spec.with_layers(spec.layers)
    assert again.layers == spec.layers
    assert again.with_layers(again.layers) == again
    for version in (spec, again):
        data = json.loads(json.dumps(spec_data(ModelSpec(stack=version).with_vocab(9))))
        assert model_spec(data).stack.layers == spec.layers
        assert json.loads(json.dumps(spec_data(model_spec(data)))) == data


@settings(max_examples=25, deadline=None)
@given(stacks(), st.data())
def test_layers_in_any_order_keep_what_they_are(spec, data):
    order = data.draw(st.lists(st.integers(0, spec.depth - 1), min_size=1, max_size=8))
    chosen = [spec.layers[i] for i in order]
    made = spec.with_layers(chosen)
    assert list(made.layers) == chosen and made.depth == len(order)
    model = ModelSpec(stack=made).with_vocab(9)
    assert list(model_spec(json.loads(json.dumps(spec_data(model)))).stack.layers) == chosen


def test_no_layer_is_a_stack_too():
    spec = StackSpec(3, 16, overrides={"1": {"window": 2}}).with_layers([])
    assert spec.depth == 0 and spec.layers == () and spec.overrides == {}
    assert model_spec(json.loads(json.dumps(spec_data(ModelSpec(stack=spec))))).stack == spec


@given(st.integers(1, 60), st.integers(1, 16))
def test_heads_that_do_not_divide_the_width_come_with_a_number_that_does(width, heads):
    if width % heads == 0:
        assert StackSpec(1, width, LayerSpec(heads=heads)).layers[0].head_dim == width // heads
        return
    with pytest.raises(BadInput, match=rf"heads \({heads}\) does not divide width \({width}\) in layer 0") as error:
        StackSpec(1, width, LayerSpec(heads=heads))
    proposed = int(str(error.value).split("heads=")[1].split(",")[0])
    assert StackSpec(1, width, LayerSpec(heads=proposed))
    assert StackSpec(1, width, LayerSpec(heads=heads, head_dim=3)).layers[0].head_dim == 3


def test_the_layer_that_is_wrong_is_named():
    with pytest.raises(BadInput, match=r"in layer 2"):
        StackSpec(4, 16, overrides={"2": {"heads": 3}})


@pytest.mark.parametrize(
    ("field", "guess"),
    [("windw", "window"), ("placment", "placement"), ("ffnwidth", "ffn_width"), ("kv_head", "kv_heads"), ("Heads", "heads")],
)
def test_an_unknown_field_names_its_nearest(field, guess):
    with pytest.raises(BadInput, match=f"overrides '0': a layer has no field '{field}'. Did you mean '{guess}'"):
        StackSpec(2, 16, overrides={"0": {field: 1}})
    with pytest.raises((ValidationError, BadInput), match=field):
        model_spec({"stack": {"layer": {field: 1}}})


@pytest.mark.parametrize(
    "change",
    [
        {"heads": "four"},
        {"heads": 2.5},
        {"heads": None},
        {"causal": "perhaps"},
        {"placement": "prenorm"},
        {"position": "rope"},
        {"window": [3]},
        {"linears": {"q": {"kind": "lora", "rnk": 2}}},
        {"linears": {"q": {"kind": "lora"}}},
        {"rope_scaling": {"kind": "yarn"}},
        {"dropout": 1.0},
        {"drop": -0.1},
        {"window": 0},
        {"heads": 0},
        {"kv_heads": 3},
        {"ffn_width": -4},
        {"norm_eps": -1.0},
        {"parallel": True, "placement": "post"},
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_in_an_override(change):
    with pytest.raises(BadInput, match=next(iter(change))):
        StackSpec(2, 16, overrides={"1": change})


def test_plain_data_in_an_override_becomes_the_thing_itself():
    spec = StackSpec(2, 16, overrides={"1": {"linears": {"q": {"kind": "lora", "rank": 2}}, "heads": "2"}})
    assert spec.layers[1].linears == {"q": LinearSpec("lora", rank=2)} and spec.layers[1].heads == 2
    assert spec.layers[0].linears == {} and spec.layers[0].heads == 4


def test_specs_are_values():
    a, b = (StackSpec(3, 16, overrides={"0:2": {"placement": "post"}}) for _ in range(2))
    assert a == b and a != dataclasses.replace(a, depth=4) and a.layers == b.layers
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.depth = 5
