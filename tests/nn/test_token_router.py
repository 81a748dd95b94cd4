"""Routers: who is active, what inactive tokens cost, and that decoding with a cache agrees. Numbers are the checks of card 041 (DLO)."""

import pytest
import torch

import layerwise as lw
from layerwise.analyze.cost import Operations
from layerwise.errors import BadInput
from layerwise.models.hf import export_hf
from layerwise.nn.cache import Cache
from layerwise.nn.token_router import ROUTING, Routing

BASE = {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 4}
IDS = {"input_ids": torch.arange(48).reshape(2, 24) * 7 % 50}


def _model(**layer):
    model = lw.load("decoder", seed=1, embedding={"vocab": 50}, stack={"depth": 4, "width": 32, "layer": {**BASE, **layer}})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # weights large enough that every layer matters
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def _routed(model, scale=1.0, **options):
    routed = lw.edit.route_tokens(model, **options).eval()
    with torch.no_grad():
        for i, layer in enumerate(routed.stack.layers):
            if layer.router is not None:
                layer.router.weight.copy_(torch.randn(32, generator=torch.Generator().manual_seed(i)) * scale)
    return routed


class Watched(Routing):
    def __init__(self, dense=False):
        self.dense, self.seen, self.active = dense, {}, {}

    def choose(self, layer, logits, real):
        self.active[layer] = super().choose(layer, logits, real)
        return self.active[layer]


def _active(model, batch):
    watched = Watched()
    with torch.no_grad():
        out = model(batch, extras={ROUTING: watched}).logits
    return out, torch.stack(list(watched.active.values()))


@pytest.mark.parametrize("placement", ["pre", "lns", "sandwich"])
def test_identity_expansion_and_fresh_routers_change_nothing(placement):
    # 1. Identity expansion, zero routers and all tokens active: sigmoid is 1/2 and the factor 1, so outputs are the model's own.
    model = _model(placement=placement)
    dlo = lw.edit.route_tokens(lw.edit.expand(model, count=2)).eval()
    assert dlo.stack.depth == 6 and all(layer.router is not None for layer in dlo.stack.layers)
    assert torch.equal(dlo(IDS).logits, model(IDS).logits)
    out, active = _active(dlo, IDS)
    assert active.all() and torch.equal(out, model(IDS).logits)


def test_skipped_tokens_pass_unchanged_and_active_ones_are_scaled():
    model = _routed(_model(), gap=0.5)
    layer = model.stack.layers[1]
    x = torch.randn(2, 9, 32)
    ctx = lw.stack.context.Context(positions=torch.arange(9)[None])
    h = layer.mixer(x, ctx, (1, 0))
    logits = (x * layer.router.weight).sum(-1)
    naive = torch.stack(
        [
            torch.stack(
                [
                    h[b, t] + (layer.ffn.change(h[b, t]) * (1 + 0.5 * (logits[b, t].sigmoid() - 0.5)) if logits[b, t] >= 0 else 0)
                    for t in range(9)
                ]
            )
            for b in range(2)
        ]
    )
    torch.testing.assert_close(layer(x, ctx, (1, 0)), naive, rtol=1e-5, atol=1e-5)
    ctx.extras[ROUTING] = Watched(dense=True)
    torch.testing.assert_close(layer(x, ctx, (1, 0)), naive, rtol=1e-5, atol=1e-5)


def test_a_tokens_decision_does_not_depend_on_later_ones():
    # 7. Causality at evaluation.
    model = _routed(_model())
    _, whole = _active(model, IDS)
    changed = {"input_ids": IDS["input_ids"].clone()}
    changed["input_ids"][:, 12:] = 3
    _, other = _active(model, changed)
    assert torch.equal(whole[..., :12], other[..., :12]) and not torch.equal(whole[..., 12:], other[..., 12:])
    assert 0.1 < whole.float().mean() < 0.9


def test_decoding_with_a_cache_equals_the_whole_pass():
    # 8. Skipped tokens have keys and values.
    model = _routed(_model())
    with torch.no_grad():
        whole = model(IDS).logits
        cache = Cache()
        parts = [model({"input_ids": ids}, cache=cache).logits for ids in IDS["input_ids"].split([5, 1, 1, 9, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert all(cache.held((i, 0)) == 24 for i in range(4))


def test_padding_is_never_active_and_moves_nothing():
    # 3. (its second half)
    model = _routed(_model())
    ids = IDS["input_ids"][:1]
    left = {
        "input_ids": torch.cat([torch.full((1, 5), 9), ids], dim=1),
        "attention_mask": torch.cat([torch.zeros(1, 5), torch.ones(1, 24)], dim=1),
    }
    plain, active = _active(model, {"input_ids": ids})
    padded, with_pad = _active(model, left)
    assert not with_pad[..., :5].any() and torch.equal(with_pad[..., 5:], active)
    torch.testing.assert_close(padded[:, 5:], plain, rtol=1e-4, atol=1e-5)


def test_inactive_tokens_cost_no_feed_forward():
    model = _routed(_model())
    _, active = _active(model, IDS)

    def operations(network):
        with torch.no_grad(), Operations() as count:
            network(IDS)
        return count.total

    plain = lw.edit.route_tokens(_model())
    one = 2 * 3 * 32 * model.stack.layers[0].spec.ffn_width
    assert operations(plain) - operations(model) == one * int((~active).sum())
    closed = lw.edit.route_tokens(_model(), bias=-1.0)  # none at all
    assert operations(plain) - operations(closed) == one * active.numel()


def test_a_routed_model_is_kept_in_our_format_and_refused_by_others(tmp_path):
    model = _routed(_model(), bias=0.3)
    lw.save(model, tmp_path / "own")
    again = lw.load(tmp_path / "own")
    assert again.spec == model.spec and torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(BadInput, match="layer 0 has a router"):
        export_hf(model, tmp_path / "theirs")


def test_routers_turn_and_shrink_with_the_stream():
    model = _routed(_model(norm="rmsnorm"))
    turned = lw.edit.rotate(model, kind="random", seed=2).eval()
    torch.testing.assert_close(turned(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-3)
    from layerwise.edit.prune.width import cut_width

    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    torch.testing.assert_close(cut_width(model, stream=order).eval()(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_impossible_routers_are_refused():
    with pytest.raises(BadInput, match="placement"):
        lw.edit.route_tokens(_model(placement="post"))
    with pytest.raises(BadInput, match="parallel"):
        lw.edit.route_tokens(_model(parallel=True))
    with pytest.raises(BadInput, match="routers already"):
        lw.edit.route_tokens(lw.edit.route_tokens(_model(), layers=["1:"]))
    with pytest.raises(BadInput, match="gap"):
        lw.edit.route_tokens(_model(), gap=3.0)
