"""Training routers by how much a token changes. Numbers are the checks of card 041 (DLO)."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import layerwise as lw
from layerwise.data.load import Split, load_data
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.errors import BadInput
from layerwise.evaluate.skipping import Counting, thresholds, token_routing
from layerwise.nn.token_router import ROUTING
from layerwise.objectives.token_routing import ByCapacity, TokenRouterLM, annealed, least
from layerwise.optim.spec import OptimizerSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec

STACK = {"depth": 3, "width": 32, "layer": {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 4}}


def _model(spread=0.5, gap=0.05, depth=3, **layer):
    stack = {**STACK, "depth": depth, "layer": {**STACK["layer"], **layer}}
    model = lw.edit.route_tokens(lw.load("decoder", seed=1, embedding={"vocab": 262}, stack=stack), gap=gap)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (spread if "router" in name else 0.2))
    return model


def _batch(pad=0):
    """Tokens that are all different, so that no two logits or similarities are."""
    batch = {"input_ids": torch.randperm(262, generator=torch.Generator().manual_seed(0))[:128].view(4, 32)}
    if pad:
        batch["attention_mask"] = (torch.arange(32) < 32 - pad).long().expand(4, -1).contiguous()
    return batch


def _objective(model, batch, step=0, total=10, **options):
    objective = TokenRouterLM(None, **options)
    objective.attach(model, batch)
    objective.before_step(step, total, None)
    return objective


@pytest.mark.parametrize("pad", [0, 7])
@pytest.mark.parametrize("capacity", [0.3, 0.5, 0.9])
def test_the_number_of_ones_and_where_they_lie(capacity, pad):
    # 3. ceil(rho N L) ones; their share of each layer is its next capacity; padding is neither labelled nor active.
    model, batch = _model(), _batch(pad)
    objective = _objective(model, batch, capacity=capacity, anneal=0)
    routing = ByCapacity(objective.capacities())
    model(batch, extras={ROUTING: routing})
    seen = [routing.seen[i] for i in range(3)]
    real = 4 * (32 - pad)
    assert [len(s.logits) for s in seen] == [real] * 3
    labels = least([s.similarity for s in seen], capacity, together=True)
    wanted = math.ceil(capacity * real * 3)
    assert sum(int(ones.sum()) for ones in labels) == wanted
    assert [int(s.active.sum()) for s in seen] == [math.ceil(capacity * real)] * 3
    objective(model, batch, torch.Generator())
    objective.before_step(1, 10, None)
    assert list(objective.capacities().values()) == pytest.approx([int(ones.sum()) / real for ones in labels])
    assert sum(objective.capacities().values()) * real == pytest.approx(wanted)
    each = least([s.similarity for s in seen], capacity, together=False)
    assert [int(ones.sum()) for ones in each] == [math.ceil(capacity * real)] * 3


def test_the_loss_is_the_naive_one():
    model, batch = _model(), _batch()
    objective = _objective(model, batch, capacity=0.5, weight=0.7, anneal=0)
    loss = objective(model, batch, torch.Generator())
    # One layer after the other, by the formulas.
    x = model.embedding(batch, torch.arange(32)[None])
    ctx = lw.stack.context.Context(positions=torch.arange(32)[None], plain=True)
    logits, cosines = [], []
    for i, layer in enumerate(model.stack.layers):
        r = (x * layer.router.weight).sum(-1)
        h = layer.mixer(x, ctx, (i, 0))
        change = layer.ffn.change(h)
        active = r >= r.flatten().sort(descending=True).values[64 - 1]
        assert int(active.sum()) == 64
        logits.append(r)
        cosines.append((h * (h + change)).sum(-1) / h.norm(dim=-1) / (h + change).norm(dim=-1))
        x = h + active[..., None] * (1 + 0.05 * (r.sigmoid() - 0.5))[..., None] * change
    u = torch.stack(cosines)
    ones = u <= u.flatten().sort().values[192 - 1]
    bce = F.binary_cross_entropy(torch.stack(logits).sigmoid(), ones.float())
    scores = model.head(model.stack.norm(x), model.token_matrix)
    ce = F.cross_entropy(scores[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    torch.testing.assert_close(loss.mean, ce + 0.7 * bce, rtol=1e-4, atol=1e-5)
    assert loss.metrics["active"] / loss.count == 0.5


def test_gradients_go_where_they_may():
    # 4. Routers learn from BCE, and from CE only through the factor: with gap 0 not at all. Nothing passes the labels.
    batch = _batch()

    def gradients(weight, gap, labels="cos-global"):
        model = _model(gap=gap)
        loss = _objective(model, batch, capacity=0.5, weight=weight, anneal=0, labels=labels)(model, batch, torch.Generator())
        loss.mean.backward()
        return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}

    without = gradients(0.0, 0.0)
    assert all(g is None or not g.any() for n, g in without.items() if "router" in n)
    assert all(g.any() for n, g in gradients(0.0, 0.05).items() if "router" in n)
    assert all(g.any() for n, g in gradients(1.0, 0.0).items() if "router" in n)
    # The top layer's feed-forward comes after all logits: BCE reaches it through nothing but u, which has no gradient.
    top = "stack.layers.2.ffn.branch.down.weight"
    assert torch.equal(gradients(1.0, 0.0)[top], without[top])


def test_the_average_capacity_falls_linearly_and_stays():
    # 6.
    assert [annealed(0.9, 1000, t) for t in (0, 500, 1000, 5000)] == [1.0, 0.95, 0.9, 0.9]
    assert annealed(0.5, 0, 0) == 0.5
    model = _model()
    objective = _objective(model, {}, capacity=0.5, anneal=0.5, total=8)
    objective.coming.copy_(torch.tensor([0.2, 0.4, 0.6]))
    objective.before_step(2, 8, None)  # mean 0.4 becomes 0.75, the shares with it; none passes 1
    assert objective.now == 0.75 and list(objective.capacities().values()) == pytest.approx([0.375, 0.75, 1.0])
    objective.before_step(5, 8, None)
    assert objective.now == 0.5 and list(objective.capacities().values()) == pytest.approx([0.2, 0.4, 0.6])


def test_training_looks_ahead_and_use_does_not():
    # 7. (the other half) the two rules are different code, and only training's depends on later tokens.
    model, batch = _model(), _batch()
    other = {"input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 16:] = 5
    first, second = ByCapacity(dict.fromkeys(range(3), 0.3)), ByCapacity(dict.fromkeys(range(3), 0.3))
    model(batch, extras={ROUTING: first})
    model(other, extras={ROUTING: second})
    early = [s.seen[0].active.view(4, 32)[:, :16] for s in (first, second)]
    assert not torch.equal(*early)


@pytest.mark.parametrize("labels", ["cos-global", "cos", "self", "random"])
def test_a_resumed_and_a_recomputed_run_are_the_plain_one(labels, text, tmp_path):
    options = {"capacity": 0.5, "labels": labels, "anneal": 0.5}
    spec = TrainSpec("token-router-lm", options, steps=6, batch=4, accumulate=2, checkpoint_every=3, optimizer=OptimizerSpec(lr=1e-2))
    spec = dataclasses.replace(spec, policies=({"name": "capacity-rates"},) if labels == "cos-global" else ())
    plain = train(_model(), text, spec).model.state_dict()
    again = train(_model(), text, dataclasses.replace(spec, recompute=True)).model.state_dict()
    assert all(torch.equal(plain[n], again[n]) for n in plain)

    class Stop(lw.train.loop.Listener):
        def progress(self, step, total, values):
            if step == 4:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(_model(), text, spec, folder=tmp_path, listener=Stop())
    resumed = train(_model(), text, spec, folder=tmp_path).model.state_dict()
    assert all(torch.equal(plain[n], resumed[n]) for n in plain)


def test_routing_composes_with_layer_dropout_and_padding(text):
    spec = TrainSpec(
        "token-router-lm", {"capacity": 0.5, "anneal": 0}, steps=4, batch=4, policies=({"name": "layer-dropout", "rate": 0.5},)
    )
    trained = train(_model(), text, spec)
    assert torch.isfinite(torch.tensor(trained.findings.metrics["train_loss"]))


def test_evaluation_counts_what_runs(text):
    model = _model()
    every = token_routing(model, text, active="all").metrics
    assert every["active_share"] == every["flops_share"] == every["ffn_share"] == 1
    chosen = token_routing(model, text).metrics
    assert 0.1 < chosen["active_share"] < 0.9 and chosen["ffn_share"] == pytest.approx(chosen["active_share"])
    one = 2 * 3 * 32 * 88 * 3  # gate, up and down in three layers
    assert every["flops_per_token"] - chosen["flops_per_token"] == pytest.approx(one * (1 - chosen["active_share"]))
    assert chosen["flops_share"] == pytest.approx(chosen["flops_per_token"] / every["flops_per_token"])
    numbers = np.random.default_rng(0).integers(6, 262, (96, 32))
    mixed = SimpleNamespace(train=Split({"rows": numbers[:64]}), validation=Split({"rows": numbers[64:]}))
    for share in (0.25, 0.75):
        moved = token_routing(model, mixed, share=share).metrics
        drawn = token_routing(model, text, active="random", share=share, seed=1).metrics
        assert moved["active_share"] == pytest.approx(share, abs=0.04)
        assert drawn["active_share"] == pytest.approx(share, abs=0.06)
    for options in ({"active": "random"}, {"active": "all", "share": 0.5}, {"share": 1.5}):
        with pytest.raises(BadInput):
            token_routing(model, text, **options)


def test_every_layer_is_held_to_its_rate_of_training(text, tmp_path):
    spec = TrainSpec("token-router-lm", {"capacity": 0.4, "anneal": 0}, steps=3, batch=8, optimizer=OptimizerSpec(lr=1e-3))
    trained = train(_model(), text, spec)
    model = trained.model
    kept = [layer.router.capacity.item() for layer in model.stack.layers]
    assert kept == pytest.approx([row[1] for row in trained.findings.tables[0].rows]) and sum(kept) / 3 == pytest.approx(0.4, abs=0.01)
    assert max(kept) - min(kept) > 0.05
    model.stack.layers[1].router.capacity.fill_(1.0)  # an open layer stays open, whatever its logits are
    numbers = np.random.default_rng(0).integers(6, 262, (96, 32))
    mixed = SimpleNamespace(train=Split({"rows": numbers[:64]}), validation=Split({"rows": numbers[64:]}))
    cuts = thresholds(model, mixed, samples=64)
    assert cuts[1] == -math.inf
    # On the rows of the calibration the rates are those of training, bottom up, by what training itself chooses.
    rows = mixed.train.batch(torch.arange(64))
    by_rank = ByCapacity({0: kept[0], 1: 1.0, 2: kept[2]})
    counted = Counting(cuts)
    with torch.no_grad():
        model(rows, extras={ROUTING: by_rank})
        model(rows, extras={ROUTING: counted})
    assert [int(counted.active[i]) for i in range(3)] == [int(by_rank.seen[i].active.sum()) for i in range(3)]
    found = token_routing(model, mixed, calibrate="layer")
    shares = [row[1] for row in found.tables[0].rows]
    assert shares == pytest.approx([kept[0], 1.0, kept[2]], abs=0.06) and shares[1] == 1
    lw.save(model, tmp_path / "kept")
    again = token_routing(lw.load(tmp_path / "kept"), mixed, calibrate="layer").metrics
    assert again["val_loss"] == found.metrics["val_loss"] and again["active_share"] == found.metrics["active_share"]
    for options in ({"share": 0.5}, {"active": "all"}, {"active": "random", "share": 0.5}):
        with pytest.raises(BadInput, match="calibrate: layer"):
            token_routing(model, mixed, calibrate="layer", **options)


def test_other_peoples_decoders_are_routed(tmp_path):
    import transformers

    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    theirs.save_pretrained(tmp_path / "theirs")
    model = lw.edit.route_tokens(lw.edit.expand(lw.load(tmp_path / "theirs"), count=2))
    batch = {"input_ids": torch.arange(64).reshape(2, 32) * 3 % 262}
    with torch.no_grad():
        torch.testing.assert_close(model(batch).logits, theirs.eval()(**batch).logits, rtol=1e-5, atol=1e-5)
    loss = _objective(model, batch, capacity=0.5, anneal=0)(model, batch, torch.Generator())
    loss.mean.backward()
    assert all(layer.router.weight.grad.any() for layer in model.stack.layers)


def test_pairs_are_trained_on_their_targets_alone(data_dir):
    spec = DataSpec("e2e-nlg", pairs={"say": ("mr", "ref")}, length=256, tokenizer=TokenizerSpec("bytes"), documents=60)
    data = load_data(spec, data_dir)
    model, batch = _model(), data.train.batch(torch.arange(4))
    loss = _objective(model, batch, capacity=0.5, anneal=0)(model, batch, torch.Generator())
    assert int(loss.count) == int((batch["labels"][:, 1:] != -100).sum()) < int(batch["attention_mask"].sum())


def test_impossible_ones_are_refused(text):
    plain = lw.load("decoder", embedding={"vocab": 262}, stack=STACK)
    with pytest.raises(BadInput, match="route-tokens"):
        train(plain, text, TrainSpec("token-router-lm", steps=1))
    with pytest.raises(BadInput, match="route-tokens"):
        token_routing(plain, text)
    with pytest.raises(BadInput, match="capacity"):
        TokenRouterLM(None, capacity=0.0)
