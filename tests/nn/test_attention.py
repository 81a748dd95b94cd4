"""Attention against a loop over heads and positions, and what masks and caches must not change."""

import math

import pytest
import torch

from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.cache import Cache
from layerwise.nn.positions import alibi_slopes, relative_bucket, rotary_angles, rotate
from layerwise.stack.context import PAD, Context
from layerwise.stack.record import record
from layerwise.stack.spec import StackSpec
from layerwise.stack.stack import Stack

IDS = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(0))
KINDS = [
    {"position": "none"},
    {"position": "rotary"},
    {"position": "alibi"},
    {"position": "relative"},
    {"position": "rotary", "window": 3},
    {"position": "alibi", "window": 2, "kv_heads": 1},
    {"position": "rotary", "kv_heads": 2, "qk_norm": True},
]


def _model(depth=3, absolute="none", seed=0, **layer):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 32, "init_std": 0.3}
    data["stack"]["layer"] |= {"heads": 4, **layer}
    data["embedding"] = {"vocab": 40, "position": absolute, "max_length": 64}
    return build(model_spec(data), seed).double().eval()


def _naive(stack, attention, x, keep):
    """One head and one query at a time."""
    spec, d = attention.spec, attention.size
    out = torch.zeros(*x.shape[:2], spec.heads, d, dtype=x.dtype)
    cos, sin = rotary_angles(torch.arange(x.shape[1]), d, spec.rope_theta)
    for b in range(x.shape[0]):
        for h in range(spec.heads):
            g = h // (spec.heads // spec.kv_heads)
            q = attention.q(x[b]).view(-1, spec.heads, d)[:, h]
            k = attention.k(x[b]).view(-1, spec.kv_heads, d)[:, g]
            v = attention.v(x[b]).view(-1, spec.kv_heads, d)[:, g]
            if attention.q_norm is not None:
                q, k = attention.q_norm(q), attention.k_norm(k)
            if spec.position == "rotary":
                q, k = (rotate(t[None, None], cos.to(t), sin.to(t))[0, 0] for t in (q, k))
            for i in range(x.shape[1]):
                scores = {}
                for j in range(x.shape[1]):
                    if not keep[b, j] or (spec.causal and j > i) or (spec.window is not None and abs(i - j) >= spec.window):
                        continue
                    s = (q[i] @ k[j]) / math.sqrt(d)
                    if spec.position == "alibi":
                        s = s - alibi_slopes(spec.heads)[h].double() * abs(i - j)
                    if spec.position == "relative":
                        bucket = relative_bucket(torch.tensor(j - i), not spec.causal, 32, 128)
                        s = s + stack.relative.weight[bucket, h]
                    scores[j] = s
                if keep[b, i]:
                    weights = torch.stack(list(scores.values())).softmax(0)
                    out[b, i, h] = sum(w * v[j] for w, j in zip(weights, scores, strict=True))
    return attention.o(out.flatten(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_equals_a_loop(kind, causal, padded):
    model = _model(depth=1, causal=causal, **kind)
    attention, x = model.stack.layers[0].mixer.branch, torch.randn(2, 7, 32, dtype=torch.float64)
    keep = torch.ones(2, 7, dtype=torch.bool)
    positions = None
    if padded:
        keep[0, 5:] = False
        positions = torch.arange(7).expand(2, 7).masked_fill(~keep, PAD)
    ctx = Context(positions=positions)
    ctx.begin(x, model.stack.relative)
    made, expected = attention(x, ctx, (0, 0)), _naive(model.stack, attention, x, keep)
    torch.testing.assert_close(made[keep], expected[keep], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_attention_is_the_same_attention(kind):
    model = _model(**kind)
    seen = record(model, {"input_ids": IDS}, attention=[0, -1])
    torch.testing.assert_close(seen.output.logits, model({"input_ids": IDS}).logits, rtol=1e-10, atol=1e-11)
    for maps in seen.attention.values():
        torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps.sum(-1)))
        distance = torch.arange(9)[None] - torch.arange(9)[:, None]
        hidden = (distance > 0) | (distance.abs() >= (kind.get("window") or 99))
        assert maps[..., hidden].abs().max() == 0
    assert set(seen.attention) == {0, 2}


@pytest.mark.parametrize("absolute", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_padding_on_either_side_changes_nothing(kind, absolute, causal):
    model = _model(absolute=absolute, causal=causal, **kind)
    plain = model({"input_ids": IDS}).logits
    for left, right in ((3, 0), (0, 4), (2, 3)):
        ids = torch.cat([torch.full((2, left), 7), IDS, torch.full((2, right), 9)], dim=1)
        mask = torch.zeros_like(ids)
        mask[:, left : left + 9] = 1
        torch.testing.assert_close(
            model({"input_ids": ids, "attention_mask": mask}).logits[:, left : left + 9], plain, rtol=1e-10, atol=1e-11
        )


@pytest.mark.parametrize("kind", KINDS)
def test_cached_chunks_equal_one_pass(kind):
    model = _model(**kind)
    whole = model({"input_ids": IDS}).logits
    for cuts in ([1] * 9, [4, 5], [3, 1, 1, 4], [8, 1]):
        cache, at, parts = Cache(), 0, []
        for n in cuts:
            parts.append(model({"input_ids": IDS[:, at : at + n]}, cache=cache).logits)
            at += n
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-12)
        assert cache.length == 9 and cache.held((0, 0)) == 9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [[0, 1, 1, 2], [2, 0], [1, 1, 1]])
def test_paths_have_caches_of_their_own(kind, path):
    model = _model(**kind)
    whole = model({"input_ids": IDS}, path=path).logits
    cache = Cache()
    parts = [model({"input_ids": IDS[:, i : i + 1]}, cache=cache, path=path).logits for i in range(9)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_cropped_cache_is_as_if_never_written(kind):
    model = _model(**kind)
    cache = Cache()
    model({"input_ids": IDS[:, :5]}, cache=cache)
    model({"input_ids": 39 - IDS[:, 5:8]}, cache=cache)
    cache.crop(5)
    torch.testing.assert_close(
        model({"input_ids": IDS[:, 5:]}, cache=cache).logits, model({"input_ids": IDS}).logits[:, 5:], rtol=1e-11, atol=1e-12
    )


def test_a_slot_that_was_skipped_keeps_its_positions_and_crops_right():
    """Layer 1 runs for positions 0-2 and 5-8 only: later queries see its keys at their true positions."""
    model = _model(position="rotary")
    cache = Cache()
    model({"input_ids": IDS[:, :3]}, cache=cache)
    model({"input_ids": IDS[:, 3:5]}, cache=cache, path=[0, 2])
    made = model({"input_ids": IDS[:, 5:]}, cache=cache).logits
    assert cache.held((1, 0)) == 7 and cache.held((0, 0)) == 9

    def skip(i, layer, x, ctx, call):
        if i != 1:
            return call(x, ctx)
        kept = torch.tensor([0, 1, 2, 5, 6, 7, 8]).expand(2, 7)
        part = call(x.gather(1, kept[..., None].expand(-1, -1, 32)), ctx.select(kept))
        return x.scatter(1, kept[..., None].expand(-1, -1, 32), part)

    expected = model({"input_ids": IDS}, around=(skip,)).logits[:, 5:]
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-11)
    cache.crop(4)
    assert cache.held((1, 0)) == 3 and cache.held((0, 0)) == 4


def test_reordered_rows_follow():
    model = _model()
    cache = Cache()
    model({"input_ids": IDS[:, :6]}, cache=cache)
    cache.reorder(torch.tensor([1, 1]))
    made = model({"input_ids": IDS[[1, 1], 6:]}, cache=cache).logits
    torch.testing.assert_close(made, model({"input_ids": IDS[[1, 1]]}).logits[:, 6:], rtol=1e-11, atol=1e-12)


def test_packed_documents_are_blind_to_each_other():
    model = _model(absolute="learned")
    segments = torch.tensor([[0] * 4 + [1] * 5] * 2)
    positions = torch.cat([torch.arange(4), torch.arange(5)]).expand(2, 9)
    packed = model({"input_ids": IDS, "segment_ids": segments, "position_ids": positions}).logits
    apart = torch.cat([model({"input_ids": part}).logits for part in (IDS[:, :4], IDS[:, 4:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-10, atol=1e-11)


def test_left_padding_with_a_cache():
    model = _model(position="rotary")
    ids = torch.cat([torch.zeros(2, 2, dtype=torch.long), IDS], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = Cache()
    parts = [model({"input_ids": ids[:, :6], "attention_mask": mask[:, :6]}, cache=cache).logits]
    parts += [model({"input_ids": ids[:, i : i + 1], "attention_mask": mask[:, : i + 1]}, cache=cache).logits for i in range(6, 11)]
    whole = model({"input_ids": ids, "attention_mask": mask}).logits
    torch.testing.assert_close(torch.cat(parts, 1)[0, 2:], whole[0, 2:], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(whole[0, 2:], model({"input_ids": IDS[:1]}).logits[0], rtol=1e-10, atol=1e-11)


def test_encoder_decoder_is_causal_padded_and_cached_right(monkeypatch):
    data = preset("encoder-decoder")
    for name in ("stack", "decoder"):
        data[name] |= {"depth": 2, "width": 32, "init_std": 0.3}
    data["embedding"] = {"vocab": 40}
    model = build(model_spec(data)).double().eval()
    source = torch.cat([IDS[:, :5], torch.full((2, 2), 3)], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 2] * 2)
    whole = model({"input_ids": source, "attention_mask": mask, "decoder_input_ids": IDS})
    short = model({"input_ids": IDS[:, :5], "decoder_input_ids": IDS})
    torch.testing.assert_close(whole.logits, short.logits, rtol=1e-10, atol=1e-11)
    changed = IDS.clone()
    changed[:, -1] = 39 - changed[:, -1]
    again = model({"input_ids": IDS[:, :5], "decoder_input_ids": changed})
    torch.testing.assert_close(again.logits[:, :-1], short.logits[:, :-1], rtol=1e-12, atol=1e-12)
    calls = []
    projection = model.decoder.layers[0].cross.branch.k
    projection.register_forward_hook(lambda *_: calls.append(1))
    cache, parts = Cache(), []
    for i in range(9):
        out = model({"input_ids": IDS[:, :5], "decoder_input_ids": IDS[:, i : i + 1]}, cache=cache, memory=short.memory)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), short.logits, rtol=1e-10, atol=1e-11)
    assert len(calls) == 1, "keys of the memory are made once"


def test_rotary_equals_transformers_and_knows_distance_only():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, k = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    positions = torch.arange(4, 13)[None]
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16))
    cos, sin = rotary_angles(positions, 16, 10000.0)
    for a, b in zip(
        apply_rotary_pos_emb(q, k, *theirs(q, positions)),
        (rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    near, far = ([rotate(t, *(a[:, None] for a in rotary_angles(positions + s, 16, 1e4))) for t in (q, k)] for s in (0, 500))
    torch.testing.assert_close(near[0] @ near[1].mT, far[0] @ far[1].mT, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("heads", [4, 8, 12])
def test_alibi_slopes_equal_transformers(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), theirs)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_equal_transformers(bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
    assert torch.equal(relative_bucket(distance, bidirectional, 32, 128), theirs)


def test_stack_runs_alone():
    stack = Stack(StackSpec(depth=2, width=16))
    stack.initialize(torch.Generator().manual_seed(0))
    assert stack(torch.randn(2, 5, 16)).shape == (2, 5, 16)
