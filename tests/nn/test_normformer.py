"""Card 005: NormFormer's norms and gains, each against its formula."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from layerwise.errors import BadInput
from layerwise.models.hf.table import FAMILIES
from layerwise.stack.context import Context
from layerwise.stack.layer import Layer
from layerwise.stack.spec import LayerSpec, StackSpec
from layerwise.stack.stack import Stack
from layerwise.table import lookup

D, H = 16, 4
NEW = {"head_scale": "before", "mixer_norm": True, "ffn_norm": True}
X = torch.randn(2, 6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(seed=1, **fields):
    base = {"heads": H, "causal": True, "norm": "layernorm", "qkv_bias": True, "out_bias": True, "ffn_bias": True, "norm_eps": 1e-12}
    layer = Layer(LayerSpec(**base | fields).resolve(0, 4, D)).double()
    layer.initialize(0.2, 0.2, 4, torch.Generator().manual_seed(seed))
    return layer


def _run(layer, x=X):
    ctx = Context()
    ctx.begin(x, None)
    return layer(x, ctx, (0, 0))


def _attend(layer, x=X):
    ctx = Context()
    ctx.begin(x, None)
    return layer.mixer.branch(x, ctx, (0, 0))


def _count(layer):
    return sum(p.numel() for p in layer.parameters())


def test_check_1_added_parameters():
    assert _count(_layer(**NEW)) - _count(_layer()) == 10 * D + H
    assert _count(_layer(**NEW, residual_gain=True)) - _count(_layer()) == 11 * D + H


def test_check_2_a_heads_gain_has_the_gradient_of_its_output_and_zero_masks_the_head():
    layer = _layer(head_scale="before")
    branch = layer.mixer.branch
    heads = []

    def keep(module, args, out):
        out.retain_grad()
        heads.append(out)

    hook = branch.head_scale.register_forward_hook(keep)
    _attend(layer).square().sum().backward()
    hook.remove()
    inner = (heads[0].grad * heads[0]).unflatten(-1, (H, -1)).sum(dim=(0, 1, 3))  # gains are 1
    torch.testing.assert_close(branch.head_scale.weight.grad, inner.detach())
    with torch.no_grad():
        for i in range(H):
            sides = []
            for step in (1e-5, -1e-5):
                branch.head_scale.weight[i] = 1 + step
                sides.append(_attend(layer).square().sum())
            branch.head_scale.weight[i] = 1
            assert ((sides[0] - sides[1]) / 2e-5).item() == pytest.approx(inner[i].item(), rel=1e-6)
        plain = _layer()
        plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "head_scale" not in k})
        branch.head_scale.weight[2] = 0
        plain.mixer.branch.o.weight[:, 8:12] = 0
        torch.testing.assert_close(_attend(layer), _attend(plain))


def test_check_3_head_scale_folds_into_the_output_projection():
    layer, plain = _layer(head_scale="before"), _layer()
    gains = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)
    with torch.no_grad():
        layer.mixer.branch.head_scale.weight.copy_(gains)
        plain.mixer.branch.o.weight.mul_(gains.repeat_interleave(D // H))
    torch.testing.assert_close(_run(layer), _run(plain))


def test_head_scale_after_the_projection_scales_groups_of_its_output():
    """The authors' code (fairseq): another function, which a following norm partly takes back."""
    layer, plain = _layer(head_scale="after"), _layer()
    gains = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)
    with torch.no_grad():
        layer.mixer.branch.head_scale.weight.copy_(gains)
    torch.testing.assert_close(_attend(layer), _attend(plain) * gains.repeat_interleave(D // H))


def test_check_4_the_post_attention_norm_makes_the_branch_free_of_scale():
    layer = _layer(mixer_norm=True)
    before = _run(layer)
    with torch.no_grad():
        layer.mixer.branch.o.weight.mul_(7.0), layer.mixer.branch.o.bias.mul_(7.0)
    torch.testing.assert_close(_run(layer), before)
    torch.testing.assert_close(layer.mixer(X, _context(), (0, 0)), X + F.layer_norm(_attend_normed(layer), (D,), eps=1e-12))


def _context():
    ctx = Context()
    ctx.begin(X, None)
    return ctx


def _attend_normed(layer):
    return layer.mixer.branch(layer.mixer.norm(X), _context(), (0, 0))


@pytest.mark.parametrize("ffn", ["relu", "gelu", "swiglu"])
def test_check_5_the_ffn_norm_stands_after_the_activation(ffn):
    layer = _layer(ffn_norm=True, ffn=ffn)
    branch = layer.ffn.branch
    inner = F.silu(branch.gate(X)) * branch.up(X) if ffn == "swiglu" else getattr(F, ffn)(branch.up(X))
    torch.testing.assert_close(branch(X), branch.down(F.layer_norm(inner, inner.shape[-1:], eps=1e-12)))
    before = branch(X)
    with torch.no_grad():
        branch.up.weight.mul_(3.0), branch.up.bias.mul_(3.0)
    assert torch.allclose(branch(X), before, rtol=1e-6) == (ffn != "gelu"), "relu and a product are homogeneous, gelu is not"


@pytest.mark.parametrize("placement", ["pre", "post", "deepnorm", "lns"])
def test_check_6_with_the_new_norms_gone_it_is_the_plain_layer_bit_for_bit(placement):
    layer, plain = _layer(**NEW, residual_gain=True, placement=placement), _layer(placement=placement)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k in plain.state_dict()})
    layer.mixer.norm_out = torch.nn.Identity()
    layer.ffn.branch.norm = torch.nn.Identity()
    assert torch.equal(_run(layer), _run(plain))


def test_check_7_causality():
    layer = _layer(**NEW, residual_gain=True)
    other = X.clone()
    other[:, 4:] += 1
    torch.testing.assert_close(_run(layer, other)[:, :4], _run(layer)[:, :4])


def test_check_8_at_init_the_attention_branch_has_standard_deviation_one_at_every_depth():
    for new, expected in ((NEW, True), ({}, False)):
        stack = Stack(StackSpec(5, D, LayerSpec(heads=H, norm="layernorm", norm_eps=1e-12, **new))).double()
        stack.initialize(torch.Generator().manual_seed(0))
        x, ctx = X, _context()
        for layer in stack.layers:
            std = layer.mixer.change(x, ctx, (0, 0)).std(dim=-1, unbiased=False)
            assert torch.allclose(std, torch.ones_like(std), atol=1e-4) == expected
            x = layer(x, ctx, (0, 0))


def test_residual_gain_scales_the_stream_beside_the_feed_forward_only():
    layer, plain = _layer(residual_gain=True), _layer()
    factor = torch.linspace(0.5, 2, D, dtype=torch.float64)
    with torch.no_grad():
        layer.ffn.residual.weight.copy_(factor)
    inner = plain.mixer(X, _context(), (0, 0))
    torch.testing.assert_close(_run(layer), factor * inner + plain.ffn.change(inner))


def test_impossible_combinations_are_refused_with_a_reason():
    for fields, why in [
        ({"placement": "sandwich", "mixer_norm": True}, "already"),
        ({"parallel": True, "residual_gain": True}, "no such place"),
        ({"head_scale": "after", "heads": 4, "kv_heads": 2}, "mean no head"),
    ]:
        with pytest.raises(BadInput, match=why):
            LayerSpec(**fields)
    with pytest.raises(BadInput, match="does not divide"):
        LayerSpec(heads=3, head_dim=8, head_scale="after").resolve(0, 1, 16)


@pytest.mark.parametrize("field", ["head_scale", "mixer_norm", "ffn_norm", "residual_gain", "stream_gate"])
def test_no_hugging_face_family_takes_a_model_it_cannot_hold(field):
    from layerwise.models.hf.fit import differences
    from layerwise.models.presets import preset
    from layerwise.models.spec import model_spec

    data = preset("decoder") | {"embedding": {"vocab": 64}}
    spec = model_spec(data)
    family = lookup(FAMILIES, "llama", "family")
    assert not differences(family, spec)
    value = {"head_scale": "before", "stream_gate": "gpas"}.get(field, True)
    changed = dataclasses.replace(
        spec, stack=dataclasses.replace(spec.stack, layer=dataclasses.replace(spec.stack.layer, **{field: value}))
    )
    assert any(field in why for why in differences(family, changed))
