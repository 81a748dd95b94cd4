"""Card 031: where the norms stand, and what follows from it exactly."""

import math

import pytest
import torch

from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.stack.context import Context
from layerwise.stack.surgery import keep

IDS = torch.arange(20).view(2, 10)


def _model(depth=4, seed=0, overrides=None, **layer):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 16, "init_std": 0.2, "overrides": overrides or {}}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    data["embedding"] = {"vocab": 40, "std": 0.632}
    return build(model_spec(data), seed).double().eval()


def _norm(x):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def _through(model, i, x):
    ctx = Context()
    ctx.begin(x, None)
    return model.stack.layers[i](x, ctx, (i, 0))


def _branches(model, i, x):
    """The two branches of a layer as plain functions of what they read."""
    layer = model.stack.layers[i]

    def attention(h):
        ctx = Context()
        ctx.begin(h, None)
        return layer.mixer.branch(h, ctx, (i, 0))

    return attention, layer.ffn.branch


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich", "deepnorm", "lns"])
def test_formulas(placement):
    model = _model(placement=placement)
    x = torch.randn(2, 10, 16, dtype=torch.float64)
    attention, ffn = _branches(model, 2, x)
    alpha, gain = (2 * 4) ** 0.25, 3**-0.5
    h = x
    for f in (attention, ffn):
        h = {
            "pre": lambda h, f: h + f(_norm(h)),
            "lns": lambda h, f: h + f(gain * _norm(h)),
            "post": lambda h, f: _norm(h + f(h)),
            "deepnorm": lambda h, f: _norm(alpha * h + f(h)),
            "sandwich": lambda h, f: h + _norm(f(_norm(h))),
        }[placement](h, f)
    torch.testing.assert_close(_through(model, 2, x), h, rtol=1e-6, atol=1e-6)


def test_no_and_all_post_layers_are_the_pure_models_bit_for_bit():
    pre, post = _model(), _model(placement="post")
    for n, pure in ((0, pre), (4, post)):
        mixed = _model(overrides={f"0:{n}": {"placement": "post"}} if n else {})
        mixed.load_state_dict(pure.state_dict())
        assert torch.equal(mixed({"input_ids": IDS}).logits, pure({"input_ids": IDS}).logits)


def test_every_ratio_has_the_same_parameters():
    counts = {sum(p.numel() for p in _model(overrides={f"0:{n}": {"placement": "post"}} if n else {}).parameters()) for n in range(5)}
    assert len(counts) == 1


def test_post_layers_give_unit_rms_and_the_stream_grows_only_above():
    model = _model(depth=6, overrides={"0:3": {"placement": "post"}})
    hiddens = model({"input_ids": IDS}, hiddens=True).hiddens
    rms = [h.square().mean(-1).sqrt() for h in hiddens]
    for i in range(3):
        torch.testing.assert_close(rms[i], torch.ones_like(rms[i]), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model.stack.layers[0].ffn.branch.down.weight.mul_(1e3)
    again = model({"input_ids": IDS}, hiddens=True).hiddens[2].square().mean(-1).sqrt()
    torch.testing.assert_close(again, torch.ones_like(again), rtol=1e-5, atol=1e-5)
    assert 1.05 < rms[3].mean() < rms[4].mean() < rms[5].mean()


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_silent_layer_is_the_identity_in_pre_and_two_norms_in_post(placement):
    model = _model(placement=placement)
    with torch.no_grad():
        model.stack.layers[1].mixer.branch.o.weight.zero_()
        model.stack.layers[1].ffn.branch.down.weight.zero_()
    x = 3 * torch.randn(2, 10, 16, dtype=torch.float64)
    out = _through(model, 1, x)
    if placement == "pre":
        assert torch.equal(out, x)
        assert torch.equal(model({"input_ids": IDS}).logits, model({"input_ids": IDS}, path=[0, 2, 3]).logits)
    else:
        torch.testing.assert_close(out, _norm(_norm(x)), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(out, x)


def test_layernorm_scaling_sets_the_gains():
    model = _model(placement="lns")
    for i, layer in enumerate(model.stack.layers):
        for norm in (layer.mixer.norm, layer.ffn.norm):
            assert torch.equal(norm.weight, torch.full_like(norm.weight, (i + 1) ** -0.5)) or torch.allclose(
                norm.weight, norm.weight * 0 + (i + 1) ** -0.5
            )
    assert torch.equal(model.stack.norm.weight, torch.ones_like(model.stack.norm.weight))


def test_deepnorm_scales_and_keeps_its_scale_when_layers_go():
    depth = 8
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 96}
    data["stack"]["layer"] |= {"heads": 4, "placement": "deepnorm"}
    data["embedding"] = {"vocab": 40}
    model = build(model_spec(data))
    layer = model.stack.layers[3]
    assert layer.mixer.alpha == pytest.approx((2 * depth) ** 0.25)
    gain = (8 * depth) ** -0.25
    for branch, role, expected in (
        (layer.mixer, "q", 1),
        (layer.mixer, "k", 1),
        (layer.mixer, "v", gain),
        (layer.mixer, "o", gain),
        (layer.ffn, "up", gain),
        (layer.ffn, "down", gain),
    ):
        weight = getattr(branch.branch, role).weight
        xavier = math.sqrt(2 / sum(weight.shape))
        assert weight.std().item() == pytest.approx(expected * xavier, rel=0.05), role
    cut = keep(model.stack, [0, 1, 5])
    assert [x.spec.residual_scale for x in cut.layers] == pytest.approx([(2 * depth) ** 0.25] * 3)
    assert [s.residual_scale for s in cut.spec.layers] == pytest.approx([(2 * depth) ** 0.25] * 3)


def test_plain_and_scaled_initialisation():
    for scaled in (False, True):
        data = preset("decoder")
        data["stack"] |= {"depth": 8, "width": 96, "scaled_init": scaled}
        data["embedding"] = {"vocab": 500, "std": 0.632}
        model = build(model_spec(data))
        write = 0.02 / (4 if scaled else 1)
        assert model.stack.layers[2].mixer.branch.o.weight.std().item() == pytest.approx(write, rel=0.05)
        assert model.stack.layers[2].ffn.branch.down.weight.std().item() == pytest.approx(write, rel=0.05)
        assert model.stack.layers[2].mixer.branch.q.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert model.embedding.tokens.weight.std().item() == pytest.approx(0.632, rel=0.05)
