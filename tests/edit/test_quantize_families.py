"""The calibration engine on stacks of other kinds: post-norm encoders, images, LayerNorm."""

import pytest
import torch

import layerwise as lw
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec


def _built(name, **more):
    data = preset(name)
    data["stack"] |= {"depth": 2, "width": 32, "init_std": 0.2}
    data["stack"]["layer"] |= {"heads": 2, "ffn_width": 64}
    for key, value in more.items():
        data[key] = {**data.get(key, {}), **value}
    return build(model_spec(data)).eval()


@pytest.mark.parametrize("scale", [None, "awq"])
def test_a_post_norm_encoder_and_one_for_images_are_calibrated_too(scale, text, digits):
    bert = _built("bert", embedding={"vocab": 262, "max_length": 32})
    vit = _built("vit", embedding={"channels": 1, "size": (8, 8), "patch": (4, 4)}, head={"classes": 10})
    for model, data in ((bert, text), (vit, digits)):
        rows = data.train.batch(torch.arange(8))
        true = model(rows).logits
        errors = []
        for bits in (2, 4, 8):
            packed = lw.edit.quantize(model, data, bits=bits, scale=scale, propagate=0.5, samples=16)
            errors.append((packed(rows).logits - true).square().mean().item())
        assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3 * true.square().mean().item()


def test_smoke_every_way_of_weighing_tokens_gives_a_model(text):
    model = _built("decoder", embedding={"vocab": 262})
    for tokens in ("attention", "first", "first-last", "norm", "change", "distance", "rare", "random"):
        packed = lw.edit.quantize(model, text, bits=3, tokens=tokens, samples=8)
        assert torch.isfinite(packed(text.train.batch(torch.arange(2))).logits).all()
