"""Card 108: the gate whose forward scales the stream and whose backward does not."""

import pytest
import torch
from torch.nn import functional as F

from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.gates import StreamGate
from layerwise.objectives.language import CausalLM
from layerwise.stack.context import Context

IDS = torch.arange(32).view(2, 16)
PLACEMENTS = ["pre", "sandwich", "lns", "post", "deepnorm"]


def _model(seed=3, overrides=None, depth=4, **layer):
    data = preset("decoder") | {"embedding": {"vocab": 64, "std": 0.6}}
    data["stack"] |= {"depth": depth, "width": 16, "init_std": 0.2, "overrides": overrides or {}}
    data["stack"]["layer"] |= {"heads": 2, "norm_eps": 1e-12, **layer}
    return build(model_spec(data), seed).double()


def _set(model, value):
    with torch.no_grad():
        for layer in model.stack.layers:
            layer.gate.alpha.fill_(value)


@pytest.mark.parametrize("placement", [*PLACEMENTS, "mix"])
def test_check_1_at_zero_it_is_the_architecture_it_is_put_on(placement):
    """Bit for bit, forward and backward (after a post-norm, up to the order in which two gradients are added), but for the gates' own gradients, which are there at once. Check 4: one scalar a layer."""
    fields = {"overrides": {"0:2": {"placement": "post"}}} if placement == "mix" else {"placement": placement}
    plain, gated = _model(**fields), _model(**fields, stream_gate="gpas")
    losses = []
    for model in (plain, gated):
        loss = CausalLM()(model, {"input_ids": IDS}).mean
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    grads = {n: p.grad for n, p in gated.named_parameters()}
    for name, parameter in plain.named_parameters():
        tolerance = 1e-12 if placement in ("post", "deepnorm", "mix") else 0
        torch.testing.assert_close(parameter.grad, grads.pop(name), rtol=tolerance, atol=tolerance * 1e-3)
    assert sorted(grads) == [f"stack.layers.{i}.gate.alpha" for i in range(4)]
    assert all(g.numel() == 1 and g != 0 for g in grads.values())


@pytest.mark.parametrize("alpha", [-1.5, 0.0, 0.7, 3.0])
def test_checks_2_and_3_gradients(alpha):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    c = torch.randn(3, 5, dtype=torch.float64)
    gate, plain = StreamGate().double(), StreamGate(preserve=False).double()
    for module in (gate, plain):
        torch.nn.init.constant_(module.alpha, alpha)
    torch.testing.assert_close(gate(x), plain(x))
    torch.testing.assert_close(gate(x), gate.factor() * x)
    (gx,) = torch.autograd.grad((c * gate(x)).sum(), x)
    assert torch.equal(gx, c)
    (px,) = torch.autograd.grad((c * plain(x)).sum(), x)
    torch.testing.assert_close(px, c * gate.factor())
    sigmoid = torch.sigmoid(torch.tensor(alpha, dtype=torch.float64))
    slope = sigmoid * (1 + alpha * (1 - sigmoid))
    for module in (gate, plain):
        (ga,) = torch.autograd.grad((c * module(x)).sum(), module.alpha)
        torch.testing.assert_close(ga, -(slope * (c * x).sum()).detach())

    def forward(a, y):
        return y - F.silu(a) * y.detach()

    a = gate.alpha.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: forward(a, x.detach()), (a,))
    assert torch.autograd.gradcheck(lambda y: forward(a.detach(), y), (x,), raise_exception=False) == (alpha == 0.0)


@pytest.mark.parametrize("placement", ["pre", "sandwich", "lns"])
def test_check_5_what_each_application_does_to_the_stream(placement):
    model = _model(placement=placement, stream_gate="gpas")
    _set(model, 0.8)
    factor = 1 - F.silu(torch.tensor(0.8, dtype=torch.float64))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    layer = model.stack.layers[1]
    ctx = Context()
    ctx.begin(x, None)
    inner = layer.mixer(x, ctx, (0, 0)) * factor
    torch.testing.assert_close(layer.mixer(x, ctx, (0, 0), gate=layer.gate), inner)
    torch.testing.assert_close(layer(x, ctx, (0, 0)), factor * layer.ffn(inner))
    torch.testing.assert_close(layer(x, ctx, (0, 0)).var(-1), factor**2 * layer.ffn(inner).var(-1))
    with torch.no_grad():
        for one in model.stack.layers:
            one.mixer.branch.o.weight.zero_(), one.ffn.branch.down.weight.zero_()
    model.stack.norm = None
    torch.testing.assert_close(model.stack(x), factor ** (2 * 4) * x)


def test_check_6_the_next_norm_does_not_see_the_scale():
    norm = torch.nn.RMSNorm(16, eps=0.0).double()
    gate = StreamGate().double()
    torch.nn.init.constant_(gate.alpha, 0.8)
    x = torch.randn(4, 16, dtype=torch.float64)
    torch.testing.assert_close(norm(gate(x)), norm(x))


@pytest.mark.parametrize("placement", ["post", "deepnorm"])
def test_check_7_post_placements_scale_the_stream_beside_the_branch_only(placement):
    model = _model(placement=placement, stream_gate="gpas")
    _set(model, 0.8)
    layer = model.stack.layers[0]
    factor, alpha = layer.gate.factor(), layer.mixer.alpha
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    ctx = Context()
    ctx.begin(x, None)
    inner = layer.mixer.norm(alpha * factor * x + layer.mixer.branch(x, ctx, (0, 0)))
    outer = layer.ffn.norm(alpha * factor * inner + layer.ffn.branch(inner))
    torch.testing.assert_close(layer(x, ctx, (0, 0)), outer)


def test_a_parallel_layer_uses_its_gate_once():
    model = _model(parallel=True, stream_gate="scale")
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    ctx = Context()
    ctx.begin(x, None)
    layer = model.stack.layers[0]
    before = layer(x, ctx, (0, 0))
    _set(model, 0.8)
    torch.testing.assert_close(layer(x, ctx, (0, 0)), layer.gate.factor() * before)
