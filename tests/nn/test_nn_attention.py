"""Attention against a loop over batch rows, heads and positions that uses only the published formulas, in float64."""

import math

import pytest
import torch

from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.stack.context import PAD, Context
from layerwise.stack.record import Recorder, record
from layerwise.stack.spec import LayerSpec, StackSpec
from layerwise.stack.stack import Stack

POSITIONS = ["none", "rotary", "alibi", "relative"]
HEADS, SIZE, WIDTH, LENGTH = 4, 4, 16, 7


def _stack(depth=1, **layer):
    stack = Stack(StackSpec(depth, WIDTH, LayerSpec(heads=HEADS, **layer), init_std=0.4, buckets=8, max_distance=6))
    stack.initialize(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for part in stack.layers:
            for norm in (part.mixer.branch.q_norm, part.mixer.branch.k_norm):
                if norm is not None:
                    norm.weight.uniform_(0.5, 2)
    return stack.double().eval()


def _turned(vector, position, theta, dims):
    """Su et al.: dimension pairs (i, i + dims / 2) turned by position * theta^(-2i / dims)."""
    out, half = vector.clone(), dims // 2
    for i in range(half):
        angle = position * theta ** (-2 * i / dims)
        a, b = vector[i], vector[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def _t5_bucket(distance, causal, buckets=8, furthest=6):
    start = 0
    if not causal:
        buckets //= 2
        start = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return start + distance
    far = exact + int(math.log(distance / exact) / math.log(furthest / exact) * (buckets - exact))
    return start + min(far, buckets - 1)


def _loop(stack, x, keep, positions=None, segments=None):
    """Probabilities (b, h, s, s) and output of the first layer's attention, one score at a time."""
    attention, spec = stack.layers[0].mixer.branch, stack.layers[0].spec
    rows, length = x.shape[:2]
    probabilities = torch.zeros(rows, HEADS, length, length, dtype=x.dtype)
    mixed = torch.zeros(rows, length, HEADS, SIZE, dtype=x.dtype)
    for b in range(rows):
        at = list(range(length)) if positions is None else positions[b].tolist()
        for h in range(HEADS):
            g = h // (HEADS // spec.kv_heads)
            q = x[b] @ attention.q.weight[h * SIZE : (h + 1) * SIZE].T
            k = x[b] @ attention.k.weight[g * SIZE : (g + 1) * SIZE].T
            v = x[b] @ attention.v.weight[g * SIZE : (g + 1) * SIZE].T
            if spec.qk_norm:
                q = q / (q.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt() * attention.q_norm.weight
                k = k / (k.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt() * attention.k_norm.weight
            if spec.position == "rotary":
                dims = spec.rotary_dim or SIZE
                q = torch.stack([_turned(t, at[i], spec.rope_theta, dims) for i, t in enumerate(q)])
                k = torch.stack([_turned(t, at[i], spec.rope_theta, dims) for i, t in enumerate(k)])
            for i in range(length):
                if not keep[b, i]:
                    continue
                scores = torch.full((length,), -math.inf, dtype=x.dtype)
                for j in range(length):
                    far = at[j] - at[i]
                    if not keep[b, j] or (spec.causal and far > 0) or (spec.window and abs(far) >= spec.window):
                        continue
                    if segments is not None and segments[b, i] != segments[b, j]:
                        continue
                    score = q[i] @ k[j] * (SIZE**-0.5 if spec.attention_scale is None else spec.attention_scale)
                    if spec.position == "alibi":
                        score = score - 2 ** (-8 * (h + 1) / HEADS) * abs(far)
                    if spec.position == "relative":
                        score = score + stack.relative.weight[_t5_bucket(far, spec.causal), h]
                    scores[j] = score
                probabilities[b, h, i] = (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()
                mixed[b, i, h] = probabilities[b, h, i] @ v
    return probabilities, mixed.flatten(2) @ attention.o.weight.T


def _run(stack, x, recorder=None, **context):
    ctx = Context(recorder=recorder, **context)
    ctx.begin(x, stack.relative)
    return stack.layers[0].mixer.branch(x, ctx, (0, 0))


def _x(seed=0):
    return torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("position", POSITIONS)
def test_fused_and_recorded_attention_equal_the_loop(position, kv_heads, window, causal):
    qk_norm = (kv_heads == 2) != (window == 3)
    stack = _stack(position=position, kv_heads=kv_heads, window=window, causal=causal, qk_norm=qk_norm)
    with torch.no_grad():
        for pads in ([], [(0, slice(0, 2)), (1, slice(5, 7))]):
            keep = torch.ones(2, LENGTH, dtype=torch.bool)
            for row, where in pads:
                keep[row, where] = False
            positions = (keep.long().cumsum(1) - 1).masked_fill(~keep, PAD) if pads else None
            x, recorder = _x(), Recorder(keep_attention=frozenset([0]))
            probabilities, expected = _loop(stack, x, keep, positions)
            torch.testing.assert_close(_run(stack, x, positions=positions)[keep], expected[keep], rtol=1e-6, atol=1e-6)
            recorded = _run(stack, x, recorder, positions=positions)
            torch.testing.assert_close(recorded[keep], _run(stack, x, positions=positions)[keep], rtol=1e-11, atol=1e-12)
            maps = recorder.attention[0].transpose(1, 2)[keep]
            torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps.sum(-1)), rtol=1e-12, atol=1e-12)
            wanted = probabilities.transpose(1, 2)[keep]
            torch.testing.assert_close(maps, wanted, rtol=1e-6, atol=1e-6)
            assert torch.equal(maps == 0, wanted == 0), "exactly what is forbidden is exactly zero"


@pytest.mark.parametrize(
    "layer",
    [
        {"position": "rotary", "rotary_dim": 2},
        {"position": "rotary", "rope_theta": 50.0},
        {"position": "none", "attention_scale": 1.0},
        {"position": "relative", "attention_scale": 0.3},
    ],
)
def test_other_scales_and_partial_rotation_equal_the_loop(layer):
    stack = _stack(causal=True, **layer)
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    _, expected = _loop(stack, _x(), keep)
    torch.testing.assert_close(_run(stack, _x()), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(_run(stack, _x(), Recorder(keep_attention=frozenset([0]))), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("position", POSITIONS)
def test_packed_documents_equal_the_loop_and_themselves_alone(position, causal):
    """Positions count on over the whole row or start anew in each document: relative kinds cannot tell."""
    stack = _stack(2, position=position, causal=causal, kv_heads=2)
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [4, 4, 4, 4, 4, 2, 9]])
    x, keep = _x(), torch.ones(2, LENGTH, dtype=torch.bool)
    _, expected = _loop(stack, x, keep, segments=segments)
    torch.testing.assert_close(_run(stack, x, segments=segments), expected, rtol=1e-6, atol=1e-6)
    packed = stack(x, Context(segments=segments))
    for row, cuts in ((0, (0, 3, 7)), (1, (0, 5, 6, 7))):
        for a, b in zip(cuts, cuts[1:], strict=False):
            # float32 angles at far positions are what the tolerance is for
            torch.testing.assert_close(packed[row, a:b], stack(x[row : row + 1, a:b])[0], rtol=1e-4, atol=1e-5)
    anew = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]])
    exact = stack(x, Context(segments=segments, positions=anew))
    torch.testing.assert_close(exact[0, 3:], stack(x[:1, 3:])[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(exact[1, :5], stack(x[1:, :5])[0], rtol=1e-11, atol=1e-12)


def test_packing_and_padding_together():
    stack = _stack(2, position="rotary", causal=True)
    x, keep = _x(), torch.ones(2, LENGTH, dtype=torch.bool)
    keep[:, -2:] = False
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2).masked_fill(~keep, PAD)
    made = stack(x, Context(positions=positions, segments=segments))
    torch.testing.assert_close(made[:, 3:5], stack(x[:, 3:5]), rtol=1e-11, atol=1e-12)
    assert made.isfinite().all()


@pytest.mark.parametrize("position", POSITIONS)
def test_a_row_of_nothing_but_padding_makes_no_nan_and_moves_no_other_row(position):
    stack = _stack(2, position=position, causal=True, window=2)
    positions = torch.stack([torch.arange(LENGTH), torch.full((LENGTH,), PAD)])
    x = _x().requires_grad_()
    made = stack(x, Context(positions=positions))
    made.sum().backward()
    assert made.isfinite().all() and x.grad.isfinite().all()
    torch.testing.assert_close(made[:1], stack(x[:1]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("position", POSITIONS)
def test_gradients_of_recorded_and_fused_attention_agree(position):
    stack = _stack(position=position, causal=True, kv_heads=2)
    grads = []
    for recorder in (None, Recorder(keep_attention=frozenset([0]))):
        stack.zero_grad()
        _run(stack, _x(), recorder).square().sum().backward()
        branch = stack.layers[0].mixer.branch
        grads.append([getattr(branch, n).weight.grad.clone() for n in "qkvo"])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_layers_that_differ_in_heads_and_windows_each_get_their_own_mask():
    """Masks are shared between layers that agree only."""
    spec = StackSpec(
        4,
        WIDTH,
        LayerSpec(heads=4, position="alibi", causal=True),
        {"1": {"heads": 2}, "2": {"window": 2}, "3": {"causal": False}},
    )
    stack = Stack(spec)
    stack.initialize(torch.Generator().manual_seed(0))
    stack = stack.double()
    h = x = _x()
    for i, layer in enumerate(stack.layers):
        ctx = Context()
        ctx.begin(h, None)
        h = layer(h, ctx, (i, 0))
    torch.testing.assert_close(stack(x), stack.norm(h), rtol=1e-12, atol=1e-12)


def test_only_the_layers_asked_for_are_recorded():
    data = preset("decoder")
    data["stack"] |= {"depth": 3, "width": 16}
    data["stack"]["layer"] |= {"heads": 2}
    model = build(model_spec(data | {"embedding": {"vocab": 20}})).eval()
    ids = torch.arange(10).view(2, 5)
    seen = record(model, {"input_ids": ids}, attention=[-1, 0])
    assert set(seen.attention) == {0, 2} and seen.attention[0].shape == (2, 2, 5, 5)
    assert not seen.attention[0].requires_grad
