"""Models that cannot work are refused when they are described, and convolutional layers equal transformers' ResNet."""

import pytest
import torch
from pydantic import ValidationError

from layerwise.errors import BadInput
from layerwise.models.heads import ClassifierHead, LMHead
from layerwise.models.model import build
from layerwise.models.plain import PlainLayer
from layerwise.models.plain_spec import PlainLayerSpec, PlainStackSpec
from layerwise.models.presets import PRESETS, preset
from layerwise.models.spec import HeadSpec, ModelSpec, model_spec

PIXELS = {"kind": "pixels", "channels": 3, "size": [8, 8]}
CONV, DENSE = {"kind": "conv", "channels": 4}, {"kind": "dense", "channels": 4}
CLASSES = {"kind": "classifier", "classes": 3}
ENCODER = {"layer": {"heads": 2}}
DECODER = {"layer": {"heads": 2, "causal": True, "cross": True}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"embedding": PIXELS, "stack": {"layers": [CONV], "inputs": 3}}, "set head.kind to classifier"),
        ({"embedding": PIXELS, "stack": {"depth": 2}, "head": CLASSES}, "give stack.layers, or set embedding.kind to patches or tokens"),
        ({"embedding": PIXELS, "stack": {"layers": [DENSE]}, "head": CLASSES}, "dense layers read vectors: set embedding.flatten to true"),
        (
            {"embedding": PIXELS | {"flatten": True}, "stack": {"layers": [CONV]}, "head": CLASSES},
            "convolutions read maps: set embedding.flatten to false",
        ),
        ({"embedding": PIXELS, "stack": {"layers": [CONV, DENSE]}, "head": CLASSES}, "all of the one or all of the other"),
        ({"stack": ENCODER | {"width": 16}, "decoder": DECODER | {"width": 32}}, r"its width \(32\) must be 16"),
        (
            {"stack": ENCODER | {"width": 16}, "decoder": DECODER | {"width": 32}, "target": {"vocab": 9}},
            r"its width \(32\) must be 16",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(data, message):
    with pytest.raises((BadInput, ValidationError), match=message):
        model_spec(data)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"kind": "residual", "size": 2}, "needs an odd size"),
        ({"kind": "dense", "pool": True}, "no pool and no stride"),
        ({"kind": "dense", "stride": 2}, "no pool and no stride"),
        ({"norm": "group", "group": 0}, "multiple of group"),
        ({"norm": "group", "group": 5}, "multiple of group"),
        ({"channels": 0}, "at least 1"),
        ({"stride": 0}, "at least 1"),
    ],
)
def test_plain_layers_that_cannot_work_are_refused(layer, message):
    with pytest.raises(BadInput, match=message):
        PlainLayerSpec(**layer)


def test_every_preset_describes_a_model():
    for name in PRESETS:
        assert isinstance(model_spec(preset(name)), ModelSpec)
    with pytest.raises(BadInput, match="unknown preset 'decodr'. Did you mean 'decoder'"):
        preset("decodr")


def _basic_layer(inner, outer, stride):
    from transformers.models.resnet.modeling_resnet import ResNetBasicLayer

    torch.manual_seed(0)
    theirs = ResNetBasicLayer(inner, outer, stride).double()
    ours = PlainLayer(PlainLayerSpec("residual", outer, inner=inner, stride=stride)).double()
    names = {"weight": "layer.0.convolution", "norm": "layer.0.normalization", "second": "layer.1.convolution"}
    names |= {"second_norm": "layer.1.normalization", "shortcut": "shortcut.convolution", "shortcut_norm": "shortcut.normalization"}
    state = theirs.state_dict()
    ours.load_state_dict({f"{k}.{leaf}": state[f"{names[k]}.{leaf}"] for k, _, leaf in (n.rpartition(".") for n in ours.state_dict())})
    assert len(ours.state_dict()) == len(state)
    return ours, theirs


@pytest.mark.parametrize(("inner", "outer", "stride"), [(4, 4, 1), (4, 8, 1), (4, 4, 2), (4, 8, 2)])
def test_a_residual_layer_is_transformers_basic_layer(inner, outer, stride):
    ours, theirs = _basic_layer(inner, outer, stride)
    x = torch.randn(3, inner, 7, 6, dtype=torch.float64)
    for training in (True, True, False):
        ours.train(training), theirs.train(training)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        made, expected = ours(a), theirs(b)
        torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-12)
        for y in (made, expected):
            y.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.norm.running_var, theirs.layer[0].normalization.running_var, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_dense_layers_are_linear_batch_norm_relu(affine):
    spec = PlainStackSpec((PlainLayerSpec("dense", 6, affine=affine, bias=True), PlainLayerSpec("dense", 4, norm="none")), inputs=5)
    first, second = (PlainLayer(s).double() for s in spec.layers)
    x = torch.randn(7, 5, dtype=torch.float64)
    if affine:
        torch.nn.init.normal_(first.norm.weight)
        torch.nn.init.normal_(first.norm.bias)
    h = x @ first.weight.weight.T + first.weight.bias
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    h = (h * first.norm.weight + first.norm.bias if affine else h).clamp(min=0)
    made = first(x)
    torch.testing.assert_close(made, h, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(second(made), (h @ second.weight.weight.T).clamp(min=0), rtol=1e-10, atol=1e-12)
    assert spec.width == 4 and spec.depth == 2 and [s.inner for s in spec.layers] == [5, 6]


def test_heads_start_with_the_stacks_deviation_or_xaviers():
    for std, expected in ((0.03, 0.03), (None, (2 / 300) ** 0.5), (0.0, 0.0)):
        head = ClassifierHead(HeadSpec("classifier", classes=100, bias=True), 200)
        head.initialize(std, torch.Generator().manual_seed(0))
        assert head.out.weight.std().item() == pytest.approx(expected, rel=0.02) and not head.out.bias.any()


def test_an_lm_head_is_scale_transform_norm_matrix_bias():
    spec = HeadSpec("lm", bias=True, transform="gelu", size=5, scale=0.5, norm="rmsnorm", norm_eps=1e-3)
    head = LMHead(spec, 8, 11)
    head.initialize(0.4, torch.Generator().manual_seed(0))
    head = head.double()
    torch.nn.init.normal_(head.bias)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    h = torch.nn.functional.gelu(0.5 * x @ head.dense.weight.T + head.dense.bias)
    h = h / (h.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(head.features(x), h, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(head(x, None), h @ head.weight.T + head.bias, rtol=1e-10, atol=1e-12)
    tied = LMHead(HeadSpec("lm", tie=True), 8, 11)
    matrix = torch.randn(11, 8, dtype=torch.float64)
    assert not list(tied.parameters()) and torch.equal(tied(x, matrix), x @ matrix.T) and tied.matrix(matrix) is matrix


def test_a_model_moved_to_another_head_or_stack_shares_the_rest():
    data = preset("decoder")
    data["stack"] |= {"depth": 2, "width": 16}
    model = build(model_spec(data | {"embedding": {"vocab": 9}}))
    spec = HeadSpec("classifier", classes=3)
    other = model.with_head(ClassifierHead(spec, 16), spec)
    assert other.stack is model.stack and other.embedding is model.embedding and other.spec.head == spec and model.spec.head.kind == "lm"
    ids = torch.arange(6).view(2, 3)
    assert other({"input_ids": ids}).logits.shape == (2, 3) and model({"input_ids": ids}).logits.shape == (2, 3, 9)
    assert torch.equal(other({"input_ids": ids}).pooled, model({"input_ids": ids}).hidden.mean(1))
