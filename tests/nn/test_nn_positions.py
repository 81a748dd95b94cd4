"""Rotary angles, ALiBi slopes, T5 buckets and sinusoids against transformers' functions and their published formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.nn.positions import RelativeBias, alibi_slopes, relative_bucket, rotary_angles, rotate, sinusoids
from layerwise.stack.parts_spec import RopeScaling


def _angles(positions, dims, theta=10000.0, scaling=None):
    cos, sin = rotary_angles(positions, dims, theta, scaling)
    return cos[:, None].double(), sin[:, None].double()


@pytest.mark.parametrize(
    ("theta", "scaling", "theirs"),
    [
        (10000.0, None, {"rope_type": "default"}),
        (500000.0, None, {"rope_type": "default"}),
        (10000.0, RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            10000.0,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_rotary_equals_llamas(theta, scaling, theirs):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters={"rope_theta": theta, **theirs})
    q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
    positions = torch.stack([torch.arange(9), torch.arange(300, 309)])
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    our_cos, our_sin = rotary_angles(positions, 16, theta, scaling)
    torch.testing.assert_close(our_cos, cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(our_sin, sin, rtol=0, atol=1e-6)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    for mine, other in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotate(mine, our_cos[:, None], our_sin[:, None]), other, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.sampled_from([2, 4, 8, 16]))
def test_a_rotated_product_knows_the_distance_only(i, j, shift, dims):
    q, k = torch.randn(2, 1, 1, 1, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(dims)).unbind()

    def product(a, b):
        return (rotate(q, *_angles(torch.tensor([[a]]), dims)) * rotate(k, *_angles(torch.tensor([[b]]), dims))).sum().item()

    assert product(i + shift, j + shift) == pytest.approx(product(i, j), abs=1e-4)


def test_rotation_keeps_lengths_starts_at_nothing_and_leaves_the_rest_alone():
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    angles = _angles(torch.arange(5)[None], 8)
    turned = rotate(x, *angles)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(turned[:, :, 0], x[:, :, 0]) and torch.equal(turned[..., 8:], x[..., 8:])
    assert torch.equal(turned[..., :8], rotate(x[..., :8], *angles)) and not torch.allclose(turned[:, :, 1:, :8], x[:, :, 1:, :8])


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20])
def test_alibi_slopes_equal_blooms(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 3), heads, torch.float32).view(heads, 3)
    torch.testing.assert_close(alibi_slopes(heads), theirs[:, 1], rtol=1e-6, atol=0)
    torch.testing.assert_close(2 * alibi_slopes(heads), theirs[:, 2], rtol=1e-6, atol=0)


def test_alibi_slopes_are_the_papers():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12).tolist() == pytest.approx([2.0**-i for i in range(1, 9)] + [2 ** -(i + 0.5) for i in range(4)])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (16, 50), (64, 256), (4, 8)])
def test_relative_buckets_equal_t5s(bidirectional, buckets, furthest):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-400, 401).view(3, 267)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional=bidirectional, num_buckets=buckets, max_distance=furthest)
    ours = relative_bucket(distance, bidirectional, buckets, furthest)
    assert torch.equal(ours, theirs) and ours.min() >= 0 and ours.max() < buckets
    if not bidirectional:
        assert (ours[distance >= 0] == 0).all() and (ours.flatten().diff() <= 0).all(), "further back, higher bucket"


def test_relative_bias_equals_t5s():
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    for decoder in (False, True):
        config = T5Config(
            d_model=16, num_heads=4, d_kv=4, is_decoder=decoder, relative_attention_num_buckets=8, relative_attention_max_distance=20
        )
        theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
        ours = RelativeBias(4, not decoder, 8, 20)
        ours.load_state_dict({"weight": theirs.relative_attention_bias.weight})
        at = torch.arange(30)
        torch.testing.assert_close(ours((at[None] - at[:, None])[None]), theirs.compute_bias(30, 30))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2000), st.integers(1, 8).map(lambda n: 2 * n))
def test_sinusoids_are_sines_then_cosines(position, width):
    made = sinusoids(torch.tensor([[position]]), width)[0, 0]
    half = width // 2
    for i in range(half):
        angle = position * 10000 ** (-i / half)
        assert made[i].item() == pytest.approx(math.sin(angle), abs=2e-3)
        assert made[half + i].item() == pytest.approx(math.cos(angle), abs=2e-3)


def test_sinusoids_equal_marians_and_have_every_width():
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    # Marian's frequencies: 10000^(-2i/width), sines in the first half, as here.
    theirs = MarianSinusoidalPositionalEmbedding(50, 16)
    torch.testing.assert_close(sinusoids(torch.arange(50)[None], 16)[0], theirs.create_weight(), rtol=1e-4, atol=1e-5)
    made = sinusoids(torch.arange(3)[None], 6)
    assert made.shape == (1, 3, 6) and made[0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    odd = sinusoids(torch.arange(3)[None], 7)
    assert torch.equal(odd[..., :6], made) and odd.shape == (1, 3, 7) and not odd[..., 6].any()
