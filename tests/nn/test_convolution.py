"""Standardized filters and bottleneck layers."""

import pytest
import torch
from torch.nn import functional as F

from layerwise.errors import BadInput
from layerwise.models.bottleneck import Bottleneck
from layerwise.models.plain_spec import PlainLayerSpec, PlainStackSpec
from layerwise.nn.convolution import Convolution
from layerwise.stack.context import Context
from layerwise.stack.stack import Stack


def _convolution(**given):
    torch.manual_seed(0)
    return Convolution(3, 5, 3, standardize=1e-10, **given).double()


X = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_filters_have_mean_0_and_variance_1_whatever_their_scale_and_offset():
    convolution = _convolution()
    used = convolution.effective().flatten(1)
    torch.testing.assert_close(used.mean(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(used.var(1, correction=0), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-7)
    before = convolution(X)
    with torch.no_grad():
        convolution.weight.mul_(torch.rand(5, 1, 1, 1) + 0.5).add_(torch.randn(5, 1, 1, 1))
    torch.testing.assert_close(convolution(X), before, rtol=1e-6, atol=1e-6)


def test_it_is_a_convolution_with_those_filters_and_gradients_move_neither_mean_nor_length():
    convolution = _convolution()
    flat = convolution.weight.detach().flatten(1)
    by_hand = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + 1e-10).sqrt()
    torch.testing.assert_close(convolution(X), F.conv2d(X, by_hand.view_as(convolution.weight), padding=1))
    (convolution(X) * torch.randn(2, 5, 7, 7, dtype=torch.float64)).sum().backward()
    gradient = convolution.weight.grad.flatten(1)
    assert gradient.abs().max() > 0.1
    torch.testing.assert_close(gradient.sum(1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)
    inner = (gradient * (flat - flat.mean(1, keepdim=True))).sum(1)
    torch.testing.assert_close(inner, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [6, 7, 8])
def test_same_padding_is_tensorflows(stride, size):
    convolution = _convolution(stride=stride, same=True)
    x = torch.randn(1, 3, size, size, dtype=torch.float64)
    out = convolution(x)
    assert out.shape[-1] == -(-size // stride)
    whole = max((out.shape[-1] - 1) * stride + 3 - size, 0)
    padded = F.pad(x, (whole // 2, whole - whole // 2) * 2)
    torch.testing.assert_close(out, F.conv2d(padded, convolution.effective(), stride=stride))


def _layer(**given):
    spec = PlainLayerSpec(**{"inner": 8, "channels": 16, "middle": 8, "norm": "group", "groups": 4, **given})
    layer = Bottleneck(spec)
    layer.initialize(0.02, 0.02, 1, torch.Generator().manual_seed(0))
    return layer.eval()


@pytest.mark.parametrize("kind", ["bottleneck", "preactivation"])
def test_group_norm_makes_an_image_independent_of_its_batch(kind):
    layer = _layer(kind=kind, standardize=1e-10)
    x = torch.randn(4, 8, 6, 6)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]), rtol=1e-5, atol=1e-6)


def test_a_preactivated_layer_without_a_branch_is_the_identity():
    layer = _layer(kind="preactivation", channels=8)
    with torch.no_grad():
        layer.convolutions[2].weight.zero_()
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(layer(x), x)  # a bottleneck with its norms after would end in a ReLU


@pytest.mark.parametrize("first", [False, True])
def test_the_stride_is_where_it_is_said_to_be(first):
    layer = _layer(kind="bottleneck", stride=2, stride_first=first)
    assert [c.stride[0] for c in layer.convolutions] == ([2, 1, 1] if first else [1, 2, 1])
    assert layer(torch.randn(1, 8, 9, 9)).shape == (1, 16, 5, 5)


def test_a_stack_of_preactivated_layers_ends_in_a_norm_that_surgery_keeps():
    layers = tuple(PlainLayerSpec(kind="preactivation", channels=8, middle=4, norm="group", groups=4) for _ in range(3))
    stack = Stack(PlainStackSpec(layers, inputs=8, final_norm=True)).eval()
    stack.initialize(torch.Generator().manual_seed(0))
    x = torch.randn(1, 8, 5, 5)
    short = stack.with_layers([stack.layers[0], stack.layers[2]])
    expected = F.relu(F.group_norm(stack.layers[2](stack.layers[0](x)), 4))
    torch.testing.assert_close(short(x, Context()), expected)
    assert short.spec.final_norm and short.norm is stack.norm


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "conv", "middle": 4}, "middle is for layers of kind bottleneck"),
        ({"kind": "residual", "standardize": 1e-6}, "standardize is for"),
        ({"kind": "bottleneck", "size": 4}, "odd size"),
        ({"kind": "bottleneck", "norm": "group", "groups": 3}, r"groups \(3\) divides"),
        ({"kind": "bottleneck", "dilation": 0}, "at least 1"),
    ],
)
def test_impossible_layers_are_refused(given, message):
    with pytest.raises(BadInput, match=message):
        PlainLayerSpec(**{"channels": 16, **given})
