"""What travels beside the stream: conditions that follow selections and rows, what may not be combined, and what is recorded of it."""

import pytest
import torch

from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.cache import Cache
from layerwise.stack.context import Context
from layerwise.stack.record import record

IDS = torch.randint(0, 40, (3, 6), generator=torch.Generator().manual_seed(1))


def _model(depth=3, **layer):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 16, "init_std": 0.3}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    return build(model_spec(data | {"embedding": {"vocab": 40}})).double().eval()


def _begun(**fields):
    ctx = Context(**fields)
    ctx.begin(torch.zeros(3, 6, 16), None)
    return ctx


@pytest.mark.parametrize("rows", [1, 3])
def test_a_selection_takes_the_conditions_of_its_positions(rows):
    condition = torch.randn(rows, 6, 4)
    tokens = torch.tensor([[0, 5], [1, 2], [4, 4]])
    chosen = _begun(condition=condition).select(tokens)
    for row in range(3):
        for at, token in enumerate(tokens[row]):
            assert torch.equal(chosen.condition[row, at], condition[row if rows == 3 else 0, token])
    vector = torch.randn(3, 4)
    assert _begun(condition=vector).select(tokens).condition is vector


def test_rows_take_what_is_a_rows_and_share_what_is_everybodys():
    rows = torch.tensor([2, 0])
    given = {
        "positions": torch.arange(18).view(3, 6),
        "segments": torch.arange(18).view(3, 6) // 4,
        "memory": torch.randn(3, 2, 4),
        "memory_mask": torch.eye(3, 2) > 0,
        "condition": torch.randn(3, 4),
    }
    chosen = _begun(**given).rows(rows)
    assert all(torch.equal(getattr(chosen, name), value[rows]) for name, value in given.items())
    shared = torch.arange(6)[None]
    assert _begun(positions=shared).rows(rows).positions is shared


def test_packed_documents_do_not_go_on_from_a_cache():
    model, cache = _model(), Cache()
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]] * 3)
    first = model({"input_ids": IDS, "segment_ids": segments}, cache=cache).logits
    torch.testing.assert_close(first, model({"input_ids": IDS, "segment_ids": segments}).logits, rtol=1e-12, atol=1e-12)
    with pytest.raises(BadInput, match="packed documents cannot go on from a cache"):
        model({"input_ids": IDS, "segment_ids": segments}, cache=cache)
    assert cache.length == 6, "nothing was announced"


@pytest.mark.parametrize("past", [0, 4])
@pytest.mark.parametrize("off", [-1, 1])
def test_a_mask_that_does_not_cover_cache_and_tokens_is_refused(past, off):
    model, cache = _model(), Cache()
    if past:
        model({"input_ids": IDS[:, :past]}, cache=cache)
    new = 6 - past
    with pytest.raises(BadInput, match=f"covers {6 + off} positions; there are {past} in the cache and {new} in input_ids"):
        model({"input_ids": IDS[:, past:], "attention_mask": torch.ones(3, 6 + off)}, cache=cache if past else None)
    made = model({"input_ids": IDS[:, past:], "attention_mask": torch.ones(3, 6)}, cache=cache if past else None).logits
    torch.testing.assert_close(made, model({"input_ids": IDS}).logits[:, past:], rtol=1e-12, atol=1e-12)


def test_hidden_states_are_what_the_next_layer_gets_whatever_wraps_the_layers():
    model, entered = _model(), []

    def shift(i, layer, x, ctx, call):
        return call(x[:, ::2], ctx.select(torch.arange(0, 6, 2).expand(3, -1))).repeat_interleave(2, dim=1) + i

    def entering(i, layer, x, ctx, call):
        entered.append(x)
        return call(x, ctx)

    out = model({"input_ids": IDS}, hiddens=True, around=(entering, shift), path=[0, 2, 1])
    assert len(out.hiddens) == 3 and all(torch.equal(a, b) for a, b in zip(out.hiddens, entered[1:], strict=False))
    assert torch.equal(model.stack.norm(out.hiddens[-1]), out.hidden)


def test_hidden_states_in_training_are_those_of_the_whole_batch():
    model = _model(drop=0.5).train()
    torch.manual_seed(0)
    out = model({"input_ids": IDS}, hiddens=True)
    assert all(h.shape == (3, 6, 16) for h in out.hiddens)
    assert torch.equal(model.stack.norm(out.hiddens[-1]), out.hidden)


def test_recorded_maps_carry_gradients_on_request_only():
    model = _model()
    assert not record(model, {"input_ids": IDS}, attention=[1]).attention[1].requires_grad
    maps = record(model, {"input_ids": IDS}, attention=[1], gradients=True).attention[1]
    (maps**2).sum().backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    mixer = "stack.layers.1.mixer."
    assert {mixer + "branch.q.weight", mixer + "branch.k.weight", mixer + "norm.weight", "embedding.tokens.weight"} <= touched
    assert not any(n.startswith(("stack.layers.2", "stack.layers.1.ffn", mixer + "branch.v")) for n in touched)
