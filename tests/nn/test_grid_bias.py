"""The learned bias for offsets between patches, and trained gains on what layers add."""

import dataclasses

import pytest
import torch

from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.spec import model_spec
from layerwise.nn.positions import GridBias, grid_offsets
from layerwise.stack.context import Context
from layerwise.stack.spec import LayerSpec, StackSpec
from layerwise.stack.stack import Stack


def test_offsets_are_those_of_a_loop():
    grid = (2, 3)
    table = grid_offsets(grid)
    places = [(r, c) for r in range(2) for c in range(3)]
    for i, (r, c) in enumerate(places, start=1):
        for j, (s, d) in enumerate(places, start=1):
            assert table[i, j] == (r - s + 1) * 5 + (c - d + 2)
    assert set(table[0, 1:].tolist()) == {15} and set(table[1:, 0].tolist()) == {16} and table[0, 0] == 17


def _bias(grid=(3, 4)):
    bias = GridBias(2, grid)
    torch.nn.init.normal_(bias.weight, generator=torch.Generator().manual_seed(0))
    return bias


def test_a_bias_linear_in_the_offset_stays_so_on_a_finer_grid():
    bias = _bias()
    with torch.no_grad():
        bias.weight[:-3] = torch.arange(-2.0, 3.0).repeat_interleave(7)[:, None]
    fine = bias((6, 4))[:, 1:, 1:].unflatten(1, (6, 4)).unflatten(3, (6, 4))
    inner = [fine[0, r, 0, s, 0].item() for r, s in ((2, 2), (3, 2), (2, 3), (4, 2))]
    steps = torch.tensor(inner)
    torch.testing.assert_close(steps, torch.tensor([0.0, 5 / 11, -5 / 11, 10 / 11]), rtol=0, atol=1e-5)
    assert torch.equal(bias((6, 4))[:, 0, 0], bias((3, 4))[:, 0, 0])


def _stack(**given):
    layer = LayerSpec(heads=2, norm="layernorm", **given)
    stack = Stack(StackSpec(depth=2, width=8, layer=layer)).eval()
    stack.initialize(torch.Generator().manual_seed(0))
    for name, parameter in stack.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "weight" in name else 0.5, generator=torch.Generator().manual_seed(len(name)))
    return stack


@pytest.mark.parametrize("position", ["grid", "grid_shared"])
def test_a_subset_of_the_patches_keeps_its_places(position):
    """Attention among some positions is the whole one with the others hidden."""
    stack = _stack(position=position, grid=(2, 2))
    layer = stack.layers[0]
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
    ctx = Context(grid=(2, 2))
    ctx.begin(x, stack.relative)
    kept = torch.tensor([[0, 2, 4]])
    out = layer(x[:, kept[0]], ctx.select(kept), (0, 0))
    hidden = Context(positions=torch.tensor([[0, -1, 2, -1, 4]]), grid=(2, 2))
    hidden.begin(x, stack.relative)
    torch.testing.assert_close(out, layer(x, hidden, (0, 0))[:, kept[0]])
    whole = Context(grid=(2, 2))
    whole.begin(x, stack.relative)
    assert not torch.allclose(out, layer(x, whole, (0, 0))[:, kept[0]])


def test_own_tables_differ_by_layer_and_a_shared_one_is_one():
    own, shared = _stack(position="grid", grid=(2, 2)), _stack(position="grid_shared", grid=(2, 2))
    assert own.relative is None and all(layer.mixer.branch.grid is not None for layer in own.layers)
    assert shared.relative is not None and all(layer.mixer.branch.grid is None for layer in shared.layers)
    short = shared.with_layers([shared.layers[1]])
    assert short.relative is shared.relative


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position": "grid"}, "grid gives the rows and columns"),
        ({"grid": (2, 2)}, "grid gives the rows and columns"),
        ({"position": "grid", "grid": (0, 2)}, "grid gives the rows and columns"),
    ],
)
def test_a_grid_goes_with_its_position(given, message):
    with pytest.raises(BadInput, match=message):
        LayerSpec(**given)


def test_one_stack_has_one_shared_bias():
    layer = LayerSpec(heads=2, position="grid_shared", grid=(2, 2))
    with pytest.raises(BadInput, match="one shared position bias"):
        StackSpec(depth=2, width=8, layer=layer, overrides={"1": {"position": "relative", "grid": None}})


def test_a_grid_needs_patches():
    data = {
        "embedding": {"vocab": 9},
        "stack": {"depth": 1, "width": 8, "layer": {"heads": 2, "position": "grid", "grid": [2, 2]}},
        "head": None,
    }
    with pytest.raises(ValueError, match="needs the patches of an image"):
        model_spec(data)


PATCHES = {
    "embedding": {"kind": "patches", "channels": 1, "size": [8, 8], "patch": [4, 4]},
    "stack": {"depth": 3, "width": 8, "layer": {"heads": 2, "norm": "layernorm", "layer_scale": 1e-4}},
    "head": {"kind": "classifier", "classes": 3, "pool": "first", "bias": True},
}


def test_layer_scale_starts_where_it_says_and_at_zero_layers_do_nothing():
    model = build(model_spec(PATCHES)).eval()
    scales = [p for n, p in model.named_parameters() if n.endswith(".scale")]
    assert len(scales) == 6 and all(torch.equal(s, torch.full((8,), 1e-4)) for s in scales)
    batch = {"pixel_values": torch.rand(2, 1, 8, 8)}
    with torch.no_grad():
        for scale in scales:
            scale.zero_()
        assert torch.equal(model(batch, hiddens=True).hiddens[-1], model.embedding(batch))


def test_layer_scale_multiplies_what_a_layer_adds():
    spec = model_spec(PATCHES)
    model = build(spec).eval()
    plain_layer = dataclasses.replace(spec.stack.layer, layer_scale=None)
    plain = build(dataclasses.replace(spec, stack=dataclasses.replace(spec.stack, layer=plain_layer))).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith(".scale")})
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".scale"):
                parameter.fill_(2.0)
        ours, theirs = model.stack.layers[0].mixer, plain.stack.layers[0].mixer
        ctx = Context()
        ctx.begin(x, None)
        torch.testing.assert_close(ours(x, ctx, (0, 0)) - x, 2 * (theirs(x, ctx, (0, 0)) - x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": {"kind": "classifier", "classes": 3, "pool": "distilled"}}, r"needs embedding\.distill_token"),
        ({"head": {"kind": "lm"}}, "scores tokens"),
        ({"embedding": {"kind": "pixels", "channels": 1, "size": [8, 8]}}, "kind to patches"),
        ({"stack": {"layers": [{"channels": 4}], "inputs": 1}}, "patches go to transformer layers"),
        ({"embedding": {"kind": "stem", "channels": 1}, "stack": {"layers": [{"channels": 4}], "inputs": 1}}, "a stem makes maps of 64"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        model_spec({**PATCHES, **change})
