"""Convolutional and dense networks through the same stack, and how heads pool."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerwise.embed.spec import PixelSpec
from layerwise.errors import BadInput
from layerwise.models.heads import pool
from layerwise.models.model import build
from layerwise.models.plain_spec import PlainLayerSpec, PlainStackSpec
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.depth import depth_of
from layerwise.stack.record import record
from layerwise.stack.surgery import keep

PIXELS = {"pixel_values": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def _model(*layers, **pixels):
    spec = ModelSpec(
        PixelSpec(channels=3, size=(8, 8), **pixels),
        PlainStackSpec(tuple(layers), inputs=192 if pixels.get("flatten") else 3),
        HeadSpec("classifier", bias=True, classes=5),
    )
    return build(spec)


def test_vgg_equals_a_sequential_with_its_weights():
    model = _model(
        PlainLayerSpec(channels=6, pool=True),
        PlainLayerSpec(channels=8, norm="group", group=4),
        PlainLayerSpec(channels=8, stride=2, norm="none", bias=True),
    )
    reference = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    reference.load_state_dict(dict(zip(reference.state_dict(), model.state_dict().values(), strict=True)))
    for training in (True, False):
        model.train(training), reference.train(training)
        torch.testing.assert_close(model(PIXELS).logits, reference((PIXELS["pixel_values"] - 0.5) / 0.5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_residual_block_is_he_et_als(norm):
    model = _model(
        PlainLayerSpec(channels=8, norm=norm, group=4),
        PlainLayerSpec("residual", 8, norm=norm, group=4),
        PlainLayerSpec("residual", 16, stride=2, norm=norm, group=4),
    )
    seen = record(model, PIXELS, hidden="all", inputs="all")
    plain, strided = model.stack.layers[1], model.stack.layers[2]
    model.eval()
    seen = record(model, PIXELS, hidden="all", inputs="all")
    x = seen.inputs[1]
    out = plain.second_norm(plain.second(F.relu(plain.norm(plain.weight(x)))))
    torch.testing.assert_close(seen.hidden[1], F.relu(out + x))
    x = seen.inputs[2]
    out = strided.second_norm(strided.second(F.relu(strided.norm(strided.weight(x)))))
    torch.testing.assert_close(seen.hidden[2], F.relu(out + strided.shortcut_norm(strided.shortcut(x))))
    assert seen.hidden[2].shape == (4, 16, 4, 4) and plain.shortcut is None


def test_the_stack_view_is_the_same():
    model = _model(PlainLayerSpec(channels=8), PlainLayerSpec("residual", 8), PlainLayerSpec("residual", 8)).eval()
    depths = depth_of(model)
    assert set(depths.values()) == {0, 1, 2, 3} and depths["head.out.weight"] == 3
    cut = model.with_stack(keep(model.stack, [0, 2]))
    assert torch.equal(cut(PIXELS).logits, model(PIXELS, path=[0, 2]).logits)
    assert cut.spec.stack.depth == 2


def test_dense_layers_are_linear_norm_relu():
    model = _model(PlainLayerSpec("dense", 12, affine=False), flatten=True).train()
    layer = model.stack.layers[0]
    x = ((PIXELS["pixel_values"] - 0.5) / 0.5).flatten(1)
    h = x @ layer.weight.weight.T
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(model(PIXELS).logits, model.head(h.relu()), rtol=1e-4, atol=1e-5)


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(BadInput, match="takes 4 channels but the layer below makes 8"):
        PlainStackSpec((PlainLayerSpec(channels=8), PlainLayerSpec(inner=4)), inputs=3)
    with pytest.raises(BadInput, match="multiple of group"):
        PlainLayerSpec(channels=6, norm="group", group=4)
    with pytest.raises(BadInput, match="layers is empty"):
        PlainStackSpec(())


@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_pooling_counts_real_positions_only(how):
    hidden = torch.randn(3, 6, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    for row in range(3):
        real = hidden[row][mask[row]]
        expected = {"mean": real.mean(0), "first": real[0], "last": real[-1]}[how]
        torch.testing.assert_close(pool(hidden, how, mask)[row], expected)
    torch.testing.assert_close(pool(hidden, how), pool(hidden, how, torch.ones(3, 6).bool()))
