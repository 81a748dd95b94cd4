"""Running a stack: paths, wrappers, stochastic depth, subsets of positions, and padding that moves nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.stack.around import StochasticDepth
from layerwise.stack.context import PAD, Context
from layerwise.stack.spec import LayerSpec, StackSpec
from layerwise.stack.stack import Stack

IDS = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(2))
EXACT = {"rtol": 1e-12, "atol": 1e-12}
POSITIONS = ["none", "rotary", "alibi", "relative"]


def _stack(depth=4, overrides=None, final_norm=True, **layer):
    stack = Stack(StackSpec(depth, 16, LayerSpec(heads=2, **layer), overrides or {}, final_norm=final_norm, init_std=0.3))
    stack.initialize(torch.Generator().manual_seed(0))
    return stack.double().eval()


def _model(name="decoder", absolute="none", **layer):
    data = preset(name)
    for part in ("stack", "decoder"):
        if part in data:
            data[part] |= {"depth": 2, "width": 16, "init_std": 0.3}
            data[part]["layer"] |= {"heads": 2, **layer}
    data["embedding"] = {"vocab": 40, "position": absolute, "max_length": 16}
    return build(model_spec(data)).double().eval()


def _x(rows=3, length=7, seed=0):
    return torch.randn(rows, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MIXED = _stack(
    overrides={
        "0": {"position": "rotary"},
        "1": {"position": "relative", "placement": "post"},
        "2": {"window": 2},
        "3": {"position": "alibi"},
    }
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=8), st.booleans())
def test_a_path_is_a_loop_over_its_layers(path, whole):
    h = x = _x()
    path = None if whole else path
    for i in range(4) if whole else path:
        ctx = Context()
        ctx.begin(h, MIXED.relative)
        h = MIXED.layers[i](h, ctx, (i, 0))
    assert torch.equal(MIXED(x, Context(path=path)), MIXED.norm(h))


@pytest.mark.parametrize("path", [[4], [0, -1], [99]])
def test_a_path_outside_the_stack_is_refused(path):
    with pytest.raises(BadInput, match=r"the stack has layers 0 to 3"):
        MIXED(_x(), Context(path=path))


def test_no_final_norm_and_no_layer():
    stack, x = _stack(depth=0, final_norm=False), _x()
    assert torch.equal(stack(x), x) and _stack(depth=0).norm is not None
    bare = _stack(depth=2, final_norm=False)
    h = x
    for i in range(2):
        ctx = Context()
        ctx.begin(h, None)
        h = bare.layers[i](h, ctx, (i, 0))
    assert torch.equal(bare(x), h)


def test_wrappers_nest_and_may_change_skip_or_repeat_a_layer():
    x, order = _x(), []

    def named(name):
        def around(i, layer, x, ctx, call):
            assert layer is MIXED.layers[i]
            order.append(f"{name}{i}")
            out = call(x, ctx)
            order.append(f"/{name}{i}")
            return out

        return around

    path = [2, 0, 2]
    around = tuple(map(named, "abc"))
    assert torch.equal(MIXED(x, Context(path=path, around=around)), MIXED(x, Context(path=path)))
    assert order == [f"{s}{n}{i}" for i in path for s, names in (("", "abc"), ("/", "cba")) for n in names]

    def skip(i, layer, x, ctx, call):
        return x if i == 1 else call(x, ctx)

    def twice(i, layer, x, ctx, call):
        return call(call(x, ctx), ctx) if i == 2 else call(x, ctx)

    def shift(i, layer, x, ctx, call):
        return call(x, ctx) + 1

    assert torch.equal(MIXED(x, Context(around=(skip,))), MIXED(x, Context(path=[0, 2, 3])))
    assert torch.equal(MIXED(x, Context(around=(twice,))), MIXED(x, Context(path=[0, 1, 2, 2, 3])))
    outer, inner = MIXED(x, Context(around=(shift, skip))), MIXED(x, Context(around=(skip, shift)))
    assert not torch.equal(outer, inner), "an outer shift acts on a skipped layer, an inner one does not"


def test_what_an_inner_wrapper_gets_is_what_the_outer_handed_on():
    x, seen = _x(), []

    def outer(i, layer, x, ctx, call):
        ctx.extras["i"] = i
        return call(x[:1], ctx.rows(torch.tensor([0]))).expand(3, -1, -1)

    def inner(i, layer, x, ctx, call):
        seen.append((x.shape[0], ctx.extras["i"]))
        return call(x, ctx)

    made = MIXED(x, Context(around=(outer, inner)))
    assert seen == [(1, i) for i in range(4)]
    torch.testing.assert_close(made[2], MIXED(x[:1])[0], **EXACT)


def test_stochastic_depth_does_nothing_at_rate_zero_or_when_evaluated():
    stack, x = _stack(drop=0.6), _x()
    rates = StochasticDepth([0.6] * 4)
    plain = stack(x)
    assert torch.equal(stack(x, Context(around=(rates,))), plain)
    stack.train()
    none = StochasticDepth([0.0] * 4)
    zero = _stack().train()
    assert torch.equal(zero(x, Context(around=(none,))), zero(x)) and torch.equal(zero(x), plain)
    assert not torch.equal(stack(x), plain)


def test_each_sample_runs_scaled_or_is_left_as_it_is_and_skipped_ones_cost_nothing():
    stack = _stack(1, position="rotary", causal=True, final_norm=False, drop=0.4).train()
    rows = 400
    x = _x(1).expand(rows, -1, -1).clone()
    ran = []
    handle = stack.layers[0].register_forward_pre_hook(lambda m, given: ran.append(given[0].shape[0]))
    torch.manual_seed(0)
    out = stack(x)
    handle.remove()
    changed = (out != x).flatten(1).any(1)
    assert ran == [int(changed.sum())] and changed.double().mean() == pytest.approx(0.6, abs=0.08)
    full = stack.eval()(x)
    torch.testing.assert_close(out[changed], (x + (full - x) / 0.6)[changed], **EXACT)
    expectation = 0.6 * (x + (full - x) / 0.6) + 0.4 * x
    torch.testing.assert_close(expectation, full, **EXACT)
    mean = torch.stack([stack.train()(x).mean(0) for _ in range(20)]).mean(0)
    torch.testing.assert_close(mean, full[0], rtol=0.15, atol=0.05)


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_run_keep_their_own_masks_memory_and_positions(packed):
    """Every surviving row equals the same row of the full batch, though the rows have different masks."""
    stack = _stack(1, position="alibi", causal=True, cross=True, final_norm=False).train()
    keep = torch.ones(8, 7, dtype=torch.bool)
    for row in range(8):
        keep[row, : row % 4] = False
    positions = (keep.long().cumsum(1) - 1).masked_fill(~keep, PAD)
    segments = torch.arange(7)[None].ge(torch.arange(8)[:, None]).long() if packed else None
    x, memory = _x(8), _x(8, 5, seed=1)
    given = {
        "positions": positions,
        "segments": segments,
        "memory": memory,
        "memory_mask": torch.arange(5)[None] <= torch.arange(8)[:, None] % 5,
    }
    full = stack(x, Context(**given))
    torch.manual_seed(1)
    out = stack(x, Context(around=(StochasticDepth([0.5]),), **given))
    ran = (out != x).flatten(1).any(1)
    assert 0 < ran.sum() < 8
    expected = torch.where(ran[:, None, None], x + (full - x) * 2, x)
    torch.testing.assert_close(out[keep], expected[keep], **EXACT)


def test_gradients_of_skipped_samples_pass_straight_through():
    stack, x = _stack(1, final_norm=False, drop=0.999999).train(), _x().requires_grad_()
    stack(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and all(p.grad is None for p in stack.parameters())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_selection_is_attention_among_the_selected_at_their_positions(position, window, causal):
    stack, x = _stack(1, position=position, window=window, causal=causal, final_norm=False), _x()
    tokens = torch.tensor([[0, 2, 5, 6], [1, 2, 3, 4], [0, 1, 3, 6]])
    index = tokens[..., None].expand(-1, -1, 16)

    def some(i, layer, x, ctx, call):
        return x.scatter(1, index, call(x.gather(1, index), ctx.select(tokens)))

    made = stack(x, Context(around=(some,)))
    # The same by masking: everything not selected is made padding, where it stands.
    positions = torch.full((3, 7), PAD).scatter(1, tokens, tokens)
    masked = stack(x, Context(positions=positions))
    torch.testing.assert_close(made.gather(1, index), masked.gather(1, index), **EXACT)
    rest = torch.ones(3, 7, dtype=torch.bool).scatter(1, tokens, False)
    assert torch.equal(made[rest], x[rest])


def test_a_selection_keeps_documents_and_padding():
    stack, x = _stack(1, position="rotary", causal=True, final_norm=False), _x()
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 3)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, PAD]] * 3)
    tokens = torch.tensor([[1, 2, 4, 6]] * 3)
    index = tokens[..., None].expand(-1, -1, 16)
    ctx = Context(positions=positions, segments=segments)
    ctx.begin(x, None)
    made = stack.layers[0](x.gather(1, index), ctx.select(tokens), (0, 0))
    only = torch.full((3, 7), PAD).scatter(1, tokens, positions.gather(1, tokens))
    expected = stack(x, Context(positions=only, segments=segments)).gather(1, index)
    torch.testing.assert_close(made[:, :3], expected[:, :3], **EXACT)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=3))
@pytest.mark.parametrize("absolute", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_padding_on_either_side_moves_nothing(causal, absolute, pads):
    """Rows of different length, padded left and right by different amounts, against every row alone."""
    for position in POSITIONS:
        model = _PADDED[position, causal, absolute]
        lengths = [7, 4, 1]
        wide = max(a + n + b for (a, b), n in zip(pads, lengths, strict=True))
        ids, mask = torch.randint(0, 40, (3, wide)), torch.zeros(3, wide, dtype=torch.long)
        for row, ((left, _), n) in enumerate(zip(pads, lengths, strict=True)):
            ids[row, left : left + n] = IDS[row, :n]
            mask[row, left : left + n] = 1
        made = model({"input_ids": ids, "attention_mask": mask}).logits
        for row, n in enumerate(lengths):
            alone = model({"input_ids": IDS[row : row + 1, :n]}).logits[0]
            torch.testing.assert_close(made[row][mask[row].bool()], alone, **EXACT)


_PADDED = {
    (p, causal, absolute): _model("decoder", absolute, position=p, causal=causal, window=None if causal else 3)
    for p in POSITIONS
    for causal in (True, False)
    for absolute in ("none", "learned", "sinusoidal")
}


@pytest.mark.parametrize("absolute", ["none", "learned", "sinusoidal"])
@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_padding_of_source_and_target_moves_nothing(position, absolute):
    model = _model("encoder-decoder", absolute, position=position)
    source, target = IDS[:, :5], IDS.flip(1)
    plain = model({"input_ids": source, "decoder_input_ids": target}).logits
    for left, right in ((2, 0), (0, 3), (1, 2)):
        made = {}
        for name, ids in (("", source), ("decoder_", target)):
            made[f"{name}input_ids"] = torch.cat([torch.full((3, left), 5), ids, torch.full((3, right), 6)], dim=1)
            made[f"{name}attention_mask"] = torch.tensor([0] * left + [1] * ids.shape[1] + [0] * right).expand(3, -1)
        logits = model(made).logits[:, left : left + 7]
        torch.testing.assert_close(logits, plain, **EXACT)
