"""Decoding with a cache is the same function as without one, in float64, whatever was fed when, forgotten or reordered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.cache import Cache
from layerwise.stack.record import record

LENGTH = 9
IDS = torch.randint(0, 40, (3, LENGTH), generator=torch.Generator().manual_seed(3))
EXACT = {"rtol": 1e-12, "atol": 1e-12}
KINDS = [
    {"position": p, "window": w, "kv_heads": g}
    for p in ("none", "rotary", "alibi", "relative")
    for w, g in ((None, None), (3, 2), (1, 1), (None, 1))
]


def _model(depth=2, absolute="none", overrides=None, **layer):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 16, "init_std": 0.3, "buckets": 8, "max_distance": 6, "overrides": overrides or {}}
    data["stack"]["layer"] |= {"heads": 4, **layer}
    data["embedding"] = {"vocab": 40, "position": absolute, "max_length": 32}
    return build(model_spec(data), 1).double().eval()


def _pieces(model, ids, cuts, cache, **context):
    at, parts = 0, []
    for n in cuts:
        parts.append(model({"input_ids": ids[:, at : at + n]}, cache=cache, **context).logits)
        at += n
    return torch.cat(parts, dim=1)


@st.composite
def chunks(draw, total=LENGTH):
    cuts = []
    while sum(cuts) < total:
        cuts.append(draw(st.integers(1, total - sum(cuts))))
    return cuts


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_token_by_token_equals_all_at_once(kind):
    model = _model(**kind)
    torch.testing.assert_close(_pieces(model, IDS, [1] * LENGTH, Cache()), model({"input_ids": IDS}).logits, **EXACT)


MIXED = _model(
    4,
    overrides={
        "0": {"position": "alibi", "kv_heads": 1},
        "1": {"window": 3},
        "2": {"position": "relative"},
        "3": {"qk_norm": True, "window": 2},
    },
)


@settings(max_examples=25, deadline=None)
@given(chunks(), st.lists(st.integers(0, 3), max_size=6))
@torch.no_grad()
def test_any_chunks_along_any_path_equal_all_at_once(cuts, path):
    """Four kinds of layer in one stack; a path may loop and skip."""
    cache = Cache()
    made = _pieces(MIXED, IDS, cuts, cache, path=path)
    torch.testing.assert_close(made, MIXED({"input_ids": IDS}, path=path).logits, **EXACT)
    assert cache.length == LENGTH and all(cache.held((i, path.count(i) - 1)) == LENGTH for i in path)
    assert not any(cache.held((i, path.count(i))) for i in range(4)), "no slot for a visit that never happened"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, LENGTH), st.integers(0, LENGTH), chunks(5))
@torch.no_grad()
def test_what_was_cropped_was_never_written(written, kept, wrong):
    kept = min(written, kept)
    cache = Cache()
    MIXED({"input_ids": IDS[:, :written]}, cache=cache)
    _pieces(MIXED, 39 - IDS[:, :5], wrong, cache)
    cache.crop(kept)
    assert cache.length == cache.held((1, 0)) == kept
    if kept < LENGTH:
        made = MIXED({"input_ids": IDS[:, kept:]}, cache=cache).logits
        torch.testing.assert_close(made, MIXED({"input_ids": IDS}).logits[:, kept:], **EXACT)


@torch.no_grad()
def test_cropping_to_more_than_there_is_changes_nothing():
    cache = Cache()
    MIXED({"input_ids": IDS[:, :4]}, cache=cache)
    cache.crop(100)
    assert cache.length == 4
    torch.testing.assert_close(MIXED({"input_ids": IDS[:, 4:]}, cache=cache).logits, MIXED({"input_ids": IDS}).logits[:, 4:], **EXACT)


@pytest.mark.parametrize("rows", [[2, 0, 1], [0], [1, 1, 1, 2, 2]])
@torch.no_grad()
def test_reordered_rows_continue_as_themselves(rows):
    cache = Cache()
    _pieces(MIXED, IDS[:, :5], [2, 3], cache)
    cache.reorder(torch.tensor(rows))
    made = _pieces(MIXED, IDS[rows, 5:], [1, 3], cache)
    torch.testing.assert_close(made, MIXED({"input_ids": IDS[rows]}).logits[:, 5:], **EXACT)


@pytest.mark.parametrize("position", ["none", "rotary", "alibi", "relative"])
@torch.no_grad()
def test_a_loop_keeps_one_cache_a_visit(position):
    model, path, cache = _model(4, position=position), [0, 1, 1, 3], Cache()
    made = _pieces(model, IDS, [4, 1, 1, 3], cache, path=path)
    torch.testing.assert_close(made, model({"input_ids": IDS}, path=path).logits, **EXACT)
    assert [cache.held((i, v)) for i, v in ((0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0))] == [9, 9, 9, 0, 0, 9]


@pytest.mark.parametrize("absolute", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize("position", ["none", "rotary", "alibi", "relative"])
@torch.no_grad()
def test_left_padded_rows_decode_as_if_alone(position, absolute):
    model = _model(position=position, absolute=absolute, window=4, kv_heads=2)
    pads = [0, 2, 5]
    for cuts in ([6, 1, 1, 1], [2, 4, 3]):
        cache, at, parts = Cache(), 0, []
        mask = torch.tensor([[0] * p + [1] * (LENGTH - p) for p in pads])
        for n in cuts:
            batch = {"input_ids": IDS[:, at : at + n], "attention_mask": mask[:, : at + n]}
            parts.append(model(batch, cache=cache).logits)
            at += n
        made = torch.cat(parts, dim=1)
        for row, p in enumerate(pads):
            alone = model({"input_ids": IDS[row : row + 1, p:]}).logits[0]
            torch.testing.assert_close(made[row, p:], alone, **EXACT)


@torch.no_grad()
def test_left_padding_reordered_and_cropped():
    model = _model(position="rotary")
    mask = torch.tensor([[0] * p + [1] * (LENGTH - p) for p in (0, 2, 4)])
    cache = Cache()
    model({"input_ids": IDS[:, :6], "attention_mask": mask[:, :6]}, cache=cache)
    rows = torch.tensor([2, 1])
    cache.reorder(rows)
    model({"input_ids": IDS[:2, :2], "attention_mask": torch.cat([mask[rows, :6], torch.ones(2, 2).long()], 1)}, cache=cache)
    cache.crop(6)
    made = model({"input_ids": IDS[rows, 6:], "attention_mask": mask[rows]}, cache=cache).logits
    for i, (row, p) in enumerate(((2, 4), (1, 2))):
        torch.testing.assert_close(made[i], model({"input_ids": IDS[row : row + 1, p:]}).logits[0, 6 - p :], **EXACT)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), unique=True), min_size=LENGTH, max_size=LENGTH), st.sampled_from(["rotary", "alibi", "relative"])
)
@torch.no_grad()
def test_layers_skipped_at_some_steps_keep_their_positions(paths, position):
    """Any path at any step equals the same pass without a cache, where every layer runs on its own positions only."""
    model = SKIPPING[position]
    paths = [sorted(p) for p in paths]
    cache = Cache()
    made = torch.cat([model({"input_ids": IDS[:, i : i + 1]}, cache=cache, path=p).logits for i, p in enumerate(paths)], dim=1)

    def only_theirs(i, layer, x, ctx, call):
        at = torch.tensor([t for t, p in enumerate(paths) if i in p]).long().expand(3, -1)
        if not at.shape[1]:
            return x
        index = at[..., None].expand(-1, -1, x.shape[-1])
        return x.scatter(1, index, call(x.gather(1, index), ctx.select(at)))

    torch.testing.assert_close(made, model({"input_ids": IDS}, around=(only_theirs,)).logits, **EXACT)
    assert [cache.held((i, 0)) for i in range(3)] == [sum(i in p for p in paths) for i in range(3)]
    cache.crop(4)
    assert [cache.held((i, 0)) for i in range(3)] == [sum(i in p for p in paths[:4]) for i in range(3)]


SKIPPING = {p: _model(3, position=p, window=4) for p in ("rotary", "alibi", "relative")}


@torch.no_grad()
def test_buffers_that_grow_past_their_first_room_lose_nothing():
    model = _model(2, position="alibi", window=40, kv_heads=1)
    ids = torch.randint(0, 40, (1, 150))
    cache = Cache()
    made = _pieces(model, ids, [60, 1, 1, 1, 1, 1, 35, 50], cache)
    torch.testing.assert_close(made, model({"input_ids": ids}).logits, **EXACT)
    assert cache.bytes == 2 * 2 * 256 * 4 * 8, "two layers, keys and values, doubled from 64 to 256, one head of four float64"


@torch.no_grad()
def test_recorded_maps_of_a_cached_step_are_the_last_rows():
    model = _model(2, position="rotary", window=4)
    whole = record(model, {"input_ids": IDS}, attention="all")
    cache = Cache()
    model({"input_ids": IDS[:, :6]}, cache=cache)
    from layerwise.stack.record import Recorder

    recorder = Recorder(keep_attention=frozenset([0, 1]))
    model({"input_ids": IDS[:, 6:]}, cache=cache, recorder=recorder)
    for i in range(2):
        torch.testing.assert_close(recorder.attention[i], whole.attention[i][:, :, 6:], **EXACT)


@pytest.mark.parametrize("position", ["relative", "rotary"])
@torch.no_grad()
def test_an_encoder_decoder_makes_the_memorys_keys_once(position):
    data = preset("encoder-decoder")
    for name in ("stack", "decoder"):
        data[name] |= {"depth": 2, "width": 16, "init_std": 0.3}
        data[name]["layer"] |= {"heads": 4, "kv_heads": 2, "position": position}
    model = build(model_spec(data | {"embedding": {"vocab": 40}})).double().eval()
    source, mask = IDS[:, :5], torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] + [1] * 4])
    batch = {"input_ids": source, "attention_mask": mask}
    whole = model(batch | {"decoder_input_ids": IDS})
    calls = {"k": 0, "v": 0, "encoder": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for layer in model.decoder.layers:
        layer.cross.branch.k.register_forward_hook(count("k"))
        layer.cross.branch.v.register_forward_hook(count("v"))
    model.stack.layers[0].register_forward_hook(count("encoder"))
    cache, at, parts = Cache(), 0, []
    for n in (1, 1, 4, 1, 2):
        parts.append(model(batch | {"decoder_input_ids": IDS[:, at : at + n]}, cache=cache, memory=whole.memory).logits)
        at += n
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, **EXACT)
    assert calls == {"k": 2, "v": 2, "encoder": 0}
    cache.reorder(torch.tensor([2, 0]))
    cache.crop(4)
    rows = [2, 0]
    made = model(
        {"input_ids": source[rows], "attention_mask": mask[rows], "decoder_input_ids": IDS[rows, 4:]},
        cache=cache,
        memory=whole.memory[rows],
    )
    torch.testing.assert_close(made.logits, whole.logits[rows, 4:], **EXACT)
