"""Card 031: every placement against its formula, at the branch, the layer and the model, and what mixing placements keeps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.residual import Residual
from layerwise.stack.context import Context
from layerwise.stack.spec import LayerSpec, StackSpec
from layerwise.stack.stack import Stack
from layerwise.stack.surgery import insert, keep, repeat

IDS = torch.arange(16).view(2, 8)
PLACEMENTS = ["pre", "post", "sandwich", "deepnorm", "lns"]


def _model(depth=4, seed=0, overrides=None, **layer):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 16, "init_std": 0.3, "overrides": overrides or {}}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    data["embedding"] = {"vocab": 40, "std": 0.6}
    return build(model_spec(data), seed).double().eval()


def _mixed(n, depth=4, **layer):
    return _model(depth, overrides={f"0:{n}": {"placement": "post"}} if n else {}, **layer)


def _through(layer, x):
    ctx = Context()
    ctx.begin(x, None)
    return layer(x, ctx, (0, 0))


def _silence(layer):
    with torch.no_grad():
        layer.mixer.branch.o.weight.zero_()
        layer.ffn.branch.down.weight.zero_()


def _randomize(norm):
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()


def _norm_by_hand(norm, kind, eps, x):
    gain = norm.weight
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain + (0 if norm.bias is None else norm.bias)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * (1 + gain if kind == "rmsnorm_zero" else gain)


@pytest.mark.parametrize("norm_bias", [True, False])
@pytest.mark.parametrize("kind", ["rmsnorm", "rmsnorm_zero", "layernorm"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_branch_with_any_norm_is_its_formula(placement, kind, norm_bias):
    """Trained norms (random gains and shifts), any function as the branch."""
    spec = LayerSpec(heads=2, placement=placement, norm=kind, norm_eps=1e-3, norm_bias=norm_bias).resolve(2, 6, 8)
    branch = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    residual = Residual(branch, spec).double()
    for norm in (residual.norm, residual.norm_out):
        if norm is not None:
            _randomize(norm)
    x = torch.randn(3, 5, 8, dtype=torch.float64)

    def n(h, norm=residual.norm):
        return _norm_by_hand(norm, kind, 1e-3, h)

    expected = {
        "pre": lambda: x + branch(n(x)),
        "lns": lambda: x + branch(n(x)),
        "post": lambda: n(x + branch(x)),
        "deepnorm": lambda: n(12**0.25 * x + branch(x)),
        "sandwich": lambda: x + n(branch(n(x)), residual.norm_out),
    }[placement]()
    torch.testing.assert_close(residual(x), expected, rtol=1e-12, atol=1e-12)
    assert (residual.norm_out is None) == (placement != "sandwich")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_layer_with_cross_attention_is_three_branches_in_order(placement):
    stack = Stack(StackSpec(3, 16, LayerSpec(heads=2, placement=placement, causal=True, cross=True)))
    stack.initialize(torch.Generator().manual_seed(0))
    layer, x = stack.double().layers[1], torch.randn(2, 5, 16, dtype=torch.float64)
    ctx = Context(memory=torch.randn(2, 3, 16, dtype=torch.float64))
    ctx.begin(x, None)
    h = x
    for part, given in ((layer.mixer, (ctx, (1, 0))), (layer.cross, (ctx, (1, 0))), (layer.ffn, ())):

        def f(h, part=part, given=given):
            return part.branch(h, *given)

        n, n_out = part.norm, part.norm_out
        if placement in ("post", "deepnorm"):
            h = n((6**0.25 if placement == "deepnorm" else 1.0) * h + f(h))
        elif placement == "sandwich":
            h = h + n_out(f(n(h)))
        else:
            h = h + f(n(h))
    torch.testing.assert_close(layer(x, ctx, (1, 0)), h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("placement", ["pre", "lns", "sandwich"])
def test_parallel_layers_add_both_branches_of_the_same_stream(placement):
    model = _model(placement=placement, parallel=True)
    layer, x = model.stack.layers[2], torch.randn(2, 8, 16, dtype=torch.float64)
    ctx = Context()
    ctx.begin(x, None)
    out = x
    for part, given in ((layer.mixer, (ctx, (2, 0))), (layer.ffn, ())):
        made = part.branch(part.norm(x), *given)
        out = out + (made if part.norm_out is None else part.norm_out(made))
    torch.testing.assert_close(_through(layer, x), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_no_post_layer_is_pre_and_all_post_layers_are_post_bit_for_bit(norm):
    for n, placement in ((0, "pre"), (5, "post")):
        pure, mixed = _model(5, placement=placement, norm=norm), _mixed(n, 5, norm=norm)
        assert mixed.state_dict().keys() == pure.state_dict().keys()
        mixed.load_state_dict(pure.state_dict())
        assert torch.equal(mixed({"input_ids": IDS}).logits, pure({"input_ids": IDS}).logits)
        assert torch.equal(
            _mixed(n, 5, norm=norm)({"input_ids": IDS}).logits, _model(5, placement=placement, norm=norm)({"input_ids": IDS}).logits
        )


@pytest.mark.parametrize("n", range(5))
def test_every_mix_is_its_layers_one_after_the_other_with_the_same_weights_and_gradients(n):
    model, shared = _mixed(n), _model().state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in shared.items()}
    model.load_state_dict(shared)
    x = model.embedding({"input_ids": IDS}, torch.arange(8)[None])
    for i, layer in enumerate(model.stack.layers):
        ctx = Context()
        ctx.begin(x, None)
        for part, given in ((layer.mixer, (ctx, (i, 0))), (layer.ffn, ())):
            f = part.branch
            x = part.norm(x + f(x, *given)) if i < n else x + f(part.norm(x), *given)
    out = model({"input_ids": IDS})
    torch.testing.assert_close(out.hidden, model.stack.norm(x), rtol=1e-12, atol=1e-12)
    out.logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("n", range(1, 5))
def test_tokens_leave_post_layers_with_unit_rms_and_pre_layers_without(n):
    hiddens = _mixed(n)({"input_ids": IDS}, hiddens=True).hiddens
    for i, h in enumerate(hiddens):
        rms = h.square().mean(-1).sqrt()
        assert (i < n) == torch.allclose(rms, torch.ones_like(rms), rtol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_silent_layer(placement):
    """Identity where the norm stands inside the branch, norm of norm where it stands outside."""
    model = _model(placement=placement)
    layer, x = model.stack.layers[1], 5 * torch.randn(2, 8, 16, dtype=torch.float64)
    _silence(layer)
    out = _through(layer, x)
    if placement in ("post", "deepnorm"):
        alpha = 8**0.25 if placement == "deepnorm" else 1.0
        torch.testing.assert_close(out, layer.ffn.norm(alpha * layer.mixer.norm(alpha * x)), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(out, x)
    else:
        assert torch.equal(out, x)


def test_leaving_out_silent_pre_layers_changes_no_bit():
    model = _mixed(2, 6)
    for i in (3, 5):
        _silence(model.stack.layers[i])
    whole = model({"input_ids": IDS}).logits
    assert torch.equal(model({"input_ids": IDS}, path=[0, 1, 2, 4]).logits, whole)
    assert torch.equal(model({"input_ids": IDS}, path=[0, 1, 2, 3, 3, 4, 5, 3]).logits, whole)
    assert torch.equal(model.with_stack(keep(model.stack, [0, 1, 2, 4]))({"input_ids": IDS}).logits, whole)
    assert not torch.allclose(model({"input_ids": IDS}, path=[0, 1, 2, 3, 5]).logits, whole)
    _silence(model.stack.layers[0])
    assert not torch.equal(model({"input_ids": IDS}, path=[1, 2, 3, 4, 5]).logits, model({"input_ids": IDS}).logits)


@pytest.mark.parametrize("kind", ["rmsnorm", "rmsnorm_zero", "layernorm"])
def test_layernorm_scaling_starts_every_norm_at_one_over_the_root_of_its_depth(kind):
    model = _model(6, placement="lns", norm=kind)
    for i, layer in enumerate(model.stack.layers):
        for norm in (layer.mixer.norm, layer.ffn.norm):
            gain = norm.weight + (1 if kind == "rmsnorm_zero" else 0)
            torch.testing.assert_close(gain, torch.full_like(gain, (i + 1) ** -0.5), rtol=1e-6, atol=1e-6)
            assert getattr(norm, "bias", None) is None or not norm.bias.any()
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    out = model.stack.norm(x)
    torch.testing.assert_close(
        out, F.rms_norm(x, (16,), eps=1e-6) if kind != "layernorm" else F.layer_norm(x, (16,), eps=1e-6), rtol=1e-6, atol=1e-6
    )


def test_scales_of_a_placement_survive_surgery():
    deep = _model(4, placement="deepnorm").stack
    extra = _model(1, placement="deepnorm").stack.layers[0]
    cut = keep(deep, [3, 0])
    assert [layer.mixer.alpha for layer in cut.layers] == [s.residual_scale for s in cut.spec.layers] == [8**0.25] * 2
    mixed = insert(cut, 1, [extra])
    assert [s.residual_scale for s in mixed.spec.layers] == pytest.approx([8**0.25, 2**0.25, 8**0.25])
    lns = repeat(_model(3, placement="lns").stack, [2, 0, 2])
    assert [s.norm_gain for s in lns.spec.layers] == pytest.approx([3**-0.5, 1, 3**-0.5])
    rebuilt = Stack(mixed.spec)
    rebuilt.initialize(torch.Generator().manual_seed(0))
    assert [layer.ffn.alpha for layer in rebuilt.layers] == [s.residual_scale for s in mixed.spec.layers]


def test_deepnorm_initial_weights_have_its_gains():
    depth, width = 6, 96
    stack = Stack(StackSpec(depth, width, LayerSpec(heads=4, kv_heads=2, ffn="swiglu", placement="deepnorm", qkv_bias=True)))
    stack.initialize(torch.Generator().manual_seed(0))
    for role in ("q", "k", "v", "o", "gate", "up", "down"):
        parts = [getattr((x.mixer if role in "qkvo" else x.ffn).branch, role) for x in stack.layers]
        expected = (1 if role in "qk" else (8 * depth) ** -0.25) * (2 / sum(parts[0].weight.shape)) ** 0.5
        weights = torch.cat([p.weight.flatten() for p in parts])
        assert weights.std().item() == pytest.approx(expected, rel=0.02), role
        assert abs(weights.mean().item()) < 0.02 * expected
        assert all(p.bias is None or not p.bias.any() for p in parts)
