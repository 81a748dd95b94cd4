"""Cross-attention against a loop, and dropout: where it acts, when, and that expectations stay."""

import pytest
import torch

from layerwise.stack.context import Context
from layerwise.stack.record import Recorder
from layerwise.stack.spec import LayerSpec, StackSpec
from layerwise.stack.stack import Stack


def _layer(dtype=torch.float64, depth=1, **layer):
    stack = Stack(StackSpec(depth, 8, LayerSpec(**{"heads": 4, **layer}), init_std=0.5, final_norm=False))
    stack.initialize(torch.Generator().manual_seed(0))
    return stack.to(dtype).layers[0]


def _begun(x, **fields):
    ctx = Context(**fields)
    ctx.begin(x, None)
    return ctx


@pytest.mark.parametrize("position", ["none", "rotary", "alibi"])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cross_attention_equals_a_loop_over_heads_and_knows_no_position(kv_heads, qk_norm, position):
    layer = _layer(causal=True, cross=True, kv_heads=kv_heads, qk_norm=qk_norm, position=position, window=1)
    branch = layer.cross.branch
    if qk_norm:
        torch.nn.init.uniform_(branch.q_norm.weight, 0.5, 2)
        torch.nn.init.uniform_(branch.k_norm.weight, 0.5, 2)
    x, memory = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    expected = torch.zeros(2, 3, 8, dtype=torch.float64)

    def head(linear, norm, rows, h):
        made = rows @ linear.weight[2 * h : 2 * h + 2].T
        return made if not qk_norm else made / (made.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    for b in range(2):
        for h in range(4):
            g = h // (4 // kv_heads)
            q, k = head(branch.q, branch.q_norm, x[b], h), head(branch.k, branch.k_norm, memory[b][mask[b]], g)
            v = memory[b][mask[b]] @ branch.v.weight[2 * g : 2 * g + 2].T
            expected[b, :, 2 * h : 2 * h + 2] = (q @ k.T / 2**0.5).softmax(-1) @ v
    made = branch(x, _begun(x, memory=memory, memory_mask=mask), (0, 0))
    torch.testing.assert_close(made, expected @ branch.o.weight.T, rtol=1e-8, atol=1e-9)
    # A recorder leaves cross-attention alone: the maps are the mixer's.
    recorder = Recorder(keep_attention=frozenset([0]))
    layer(x, _begun(x, memory=memory, memory_mask=mask, recorder=recorder), (0, 0))
    assert recorder.attention[0].shape == (2, 4, 3, 3)


def test_cross_attention_without_a_memory_says_so():
    layer, x = _layer(causal=True, cross=True), torch.zeros(1, 2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"needs ctx.memory, the encoder's output"):
        layer(x, _begun(x), (0, 0))


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_dropout_zeroes_and_doubles_what_a_branch_adds(placement):
    layer, x = _layer(dropout=0.5, placement=placement), torch.randn(64, 3, 8, dtype=torch.float64)
    residual = layer.ffn
    if placement == "post":
        change = residual.branch(x)
        residual.norm = torch.nn.Identity()
    else:
        change = residual.change(x) if not residual.training else residual.eval().change(x)
    assert torch.equal(residual.eval()(x), x + change)
    ratio = (residual.train()(x) - x) / change
    zero, double = ratio.abs() < 1e-6, (ratio - 2).abs() < 1e-6
    assert (zero | double).all() and double.double().mean().item() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_dropout_acts_on_probabilities_in_training_only_fused_or_recorded(causal):
    rows = 6000
    layer = _layer(torch.float32, attention_dropout=0.4, causal=causal, kv_heads=2)
    branch, one = layer.mixer.branch, torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    x, spread = one.expand(rows, -1, -1), []
    with torch.no_grad():
        plain = branch.eval()(one, _begun(one), (0, 0))
        torch.testing.assert_close(branch(x, _begun(x), (0, 0)), plain.expand(rows, -1, -1), rtol=1e-5, atol=1e-5)
        branch.train()
        torch.manual_seed(0)
        for recorder in (None, Recorder(keep_attention=frozenset([0]))):
            made = branch(x, _begun(x, recorder=recorder), (0, 0))
            torch.testing.assert_close(made.mean(0), plain[0], rtol=0.1, atol=0.1)
            spread.append(made.std(0))
            if recorder is not None:
                maps = recorder.attention[0]
                torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps.sum(-1)), rtol=1e-5, atol=1e-5)
    assert (spread[0] > 0.05).all(), "something is dropped"
    torch.testing.assert_close(spread[0], spread[1], rtol=0.1, atol=0.02)
