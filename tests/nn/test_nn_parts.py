"""Norms, feed-forwards and linears against transformers' modules and their formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from layerwise.errors import BadInput
from layerwise.nn.ffn import FeedForward, activation
from layerwise.nn.linear import Dense, LoRA, make_linear
from layerwise.nn.norms import ZeroRMSNorm, fill_norm, make_norm
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import LayerSpec, StackSpec
from layerwise.stack.stack import Stack

ACTIVATIONS = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
    "geglu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "geglu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
}


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _ffn(**layer):
    module = FeedForward(LayerSpec(**layer).resolve(0, 1, 12)).double()
    for i, part in enumerate((module.gate, module.up, module.down)):
        if part is not None:
            part.initialize(0.5, _seeded(i))
            if part.bias is not None:
                torch.nn.init.normal_(part.bias, generator=_seeded(9 + i))
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_feed_forwards_are_their_formula(name, bias):
    module, x = _ffn(ffn=name, ffn_bias=bias), torch.randn(2, 3, 12, dtype=torch.float64)
    act = ACTIVATIONS[name]
    torch.testing.assert_close(activation(name)(3 * x), act(3 * x), rtol=1e-12, atol=1e-12)

    def linear(part, h):
        return h @ part.weight.T + (part.bias if bias else 0)

    gated = "glu" in name
    inner = act(linear(module.gate, x)) * linear(module.up, x) if gated else act(linear(module.up, x))
    torch.testing.assert_close(module(x), linear(module.down, inner), rtol=1e-12, atol=1e-12)
    assert (module.gate is not None) == gated and module.up.weight.shape == (32 if gated else 48, 12)


@pytest.mark.parametrize(("width", "inner"), [(64, 176), (512, 1368), (768, 2048), (3, 8)])
def test_gated_feed_forwards_keep_the_parameter_count(width, inner):
    """8/3 of the width, rounded up to a multiple of 8: card 031's table for 512 and 768."""
    assert LayerSpec(heads=1, ffn="swiglu").resolve(0, 1, width).ffn_width == inner
    assert LayerSpec(heads=1, ffn="relu").resolve(0, 1, width).ffn_width == 4 * width
    assert LayerSpec(heads=1, ffn="swiglu", ffn_width=5).resolve(0, 1, width).ffn_width == 5


def test_swiglu_is_llamas_mlp():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs = LlamaMLP(LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2)).double()
    ours = _ffn(ffn="swiglu", ffn_width=20)
    ours.load_state_dict({k.replace("_proj", ""): v for k, v in theirs.state_dict().items()})
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rmsnorm_zero_is_gemmas(dtype):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    ours, theirs = make_norm("rmsnorm_zero", 64, 1e-5), GemmaRMSNorm(64, eps=1e-5)
    torch.nn.init.normal_(ours.weight, generator=_seeded())
    theirs.load_state_dict(ours.state_dict())
    x = (5 * torch.randn(64, 64, generator=_seeded(1))).to(dtype)
    made, expected = ours.to(dtype)(x), theirs.to(dtype)(x)
    assert made.dtype == dtype
    if dtype == torch.bfloat16:
        assert torch.equal(made, expected), "half precision is scaled in float32 and rounded once"
    # Theirs computes in float32 whatever it is given.
    torch.testing.assert_close(made, expected.to(dtype), rtol=1e-5, atol=1e-5)


def test_rmsnorm_is_llamas_and_layernorm_is_the_papers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = 5 * torch.randn(4, 8, dtype=torch.float64)
    ours, theirs = make_norm("rmsnorm", 8, 1e-3), LlamaRMSNorm(8, eps=1e-3)
    torch.nn.init.normal_(ours.weight, generator=_seeded())
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.double()(x), theirs.double()(x), rtol=1e-6, atol=1e-6)
    norm = make_norm("layernorm", 8, 1e-2).double()
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(norm(x), centred / (centred.square().mean(-1, keepdim=True) + 1e-2).sqrt(), rtol=1e-10, atol=1e-12)
    assert make_norm("layernorm", 8, 1e-2, bias=False).bias is None


@pytest.mark.parametrize("kind", ["rmsnorm", "rmsnorm_zero", "layernorm"])
def test_a_filled_norm_multiplies_by_its_gain(kind):
    norm, plain = make_norm(kind, 6, 1e-6), make_norm(kind, 6, 1e-6)
    for p in norm.parameters():
        torch.nn.init.normal_(p, generator=_seeded())
    fill_norm(norm, 0.3)
    fill_norm(plain, 1.0)
    x = torch.randn(3, 6)
    torch.testing.assert_close(norm(x), 0.3 * plain(x))
    fill_norm(norm, 0.0)
    assert torch.equal(norm(x), torch.zeros_like(x))
    assert (norm.weight == (-1 if isinstance(norm, ZeroRMSNorm) else 0)).all()


def test_norms_of_queries_and_keys_start_at_one_in_every_placement():
    for placement in ("pre", "lns", "deepnorm"):
        stack = Stack(StackSpec(2, 16, LayerSpec(heads=2, qk_norm=True, placement=placement)))
        stack.initialize(_seeded())
        for layer in stack.layers:
            assert (layer.mixer.branch.q_norm.weight == 1).all() and (layer.mixer.branch.k_norm.weight == 1).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rank", "alpha", "scale"), [(3, None, 1.0), (2, 8.0, 4.0), (4, 1.0, 0.25)])
def test_lora_adds_its_scaled_product_and_starts_at_nothing(rank, alpha, scale, bias):
    lora = LoRA(7, 5, bias, LinearSpec("lora", rank=rank, alpha=alpha)).double()
    dense = Dense(7, 5, bias).double()
    lora.initialize(0.3, _seeded(4))
    dense.initialize(0.3, _seeded(4))
    x = torch.randn(2, 7, dtype=torch.float64)
    assert torch.equal(lora.weight, dense.weight) and torch.equal(lora(x), dense(x)) and torch.equal(lora.materialize(), lora.weight)
    torch.nn.init.normal_(lora.lora_b, generator=_seeded(1))
    if bias:
        torch.nn.init.normal_(lora.bias, generator=_seeded(2))
    expected = x @ lora.weight.T + scale * ((x @ lora.lora_a.T) @ lora.lora_b.T) + (lora.bias if bias else 0)
    torch.testing.assert_close(lora(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(F.linear(x, lora.materialize(), lora.bias), lora(x), rtol=1e-12, atol=1e-12)
    lora(x).square().sum().backward()
    assert {n for n, p in lora.named_parameters() if p.grad is not None} == {"lora_a", "lora_b"}
    assert lora.lora_a.abs().max() <= 7**-0.5


def test_loras_dropout_is_on_the_low_rank_term_in_training_only():
    lora = LoRA(400, 3, False, LinearSpec("lora", rank=2, dropout=0.5)).double()
    lora.initialize(0.3, _seeded())
    torch.nn.init.normal_(lora.lora_b, generator=_seeded(1))
    x = torch.ones(1, 400, dtype=torch.float64)
    low = [lora(x) - F.linear(x, lora.weight) for _ in range(2)]
    assert not torch.equal(*low)
    lora.eval()
    torch.testing.assert_close(lora(x), F.linear(x, lora.materialize()), rtol=1e-12, atol=1e-12)
    lora.train()
    torch.nn.init.zeros_(lora.lora_b)
    assert torch.equal(lora(x), F.linear(x, lora.weight))


def test_linears_are_chosen_by_role():
    spec = LayerSpec(linears={"up": LinearSpec("lora", rank=2), "cross.q": LinearSpec("lora", rank=1)})
    assert isinstance(make_linear("up", 4, 4, False, spec), LoRA) and isinstance(make_linear("cross.q", 4, 4, False, spec), LoRA)
    assert type(make_linear("q", 4, 4, False, spec)) is Dense
    with pytest.raises(BadInput, match="unknown linear 'loar'. Did you mean 'lora'"):
        make_linear("q", 4, 4, False, LayerSpec(linears={"q": LinearSpec("loar")}))


def test_linears_start_normal_with_no_bias():
    dense = Dense(200, 300, True)
    dense.initialize(0.07, _seeded())
    assert dense.weight.std().item() == pytest.approx(0.07, rel=0.02) and abs(dense.weight.mean().item()) < 1e-3
    assert not dense.bias.any()
