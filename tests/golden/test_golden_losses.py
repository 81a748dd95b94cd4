"""Losses and schedules of compression and adaptive inference beside the numbers of published code."""

from types import SimpleNamespace

import pytest
import torch
from waves import decoder, golden, tokens, wave

import layerwise as lw
from layerwise.nn.token_router import BY_SIGN, ROUTING, Routing
from layerwise.objectives.cache import CacheReconstruction
from layerwise.objectives.distances import distances
from layerwise.objectives.divergence import divergence
from layerwise.objectives.early_exit import enabled
from layerwise.objectives.nearness import nearness
from layerwise.objectives.prediction_heads import PredictionHeads
from layerwise.objectives.token_routing import TokenRouterLM
from layerwise.train.policies.layer_dropout import LayerDropout

BATCH = {"input_ids": tokens()}


def _close(made, wanted, **how):
    torch.testing.assert_close(made.detach(), torch.tensor(wanted), **{"rtol": 1e-4, "atol": 1e-5, **how})


def test_teds_terms():
    wanted = golden("ted")
    ours, theirs = (SimpleNamespace(logits=2 * wave(6, 5, at=at), mask=None, model=SimpleNamespace(head=None)) for at in (0, 1))
    kl = divergence(ours, theirs, 2.0)
    states = [(wave(6, 4, 8, at=i), wave(6, 4, 8, at=0.3 * i + 2)) for i in range(3)]
    mse = torch.stack([distances("mse", a, b).mean() for a, b in states]).mean()
    _close(kl, wanted["kl"])
    _close(mse, wanted["mse"])
    _close(0.7 + 20 * kl + 50 * mse, wanted["loss"])
    # Without filters on the teacher: every second layer's output, the embedding's not counted.
    raw = [distances("mse", wave(6, 4, 8, at=i), wave(6, 4, 8, at=5 + layer)).mean() for i, layer in enumerate((2, 4, 6))]
    _close(torch.stack(raw).mean(), wanted["layerwise"])


def test_distilhuberts_loss_and_heads():
    wanted = golden("distilhubert")
    ours, theirs = wave(2, 3, 5, 8), wave(2, 3, 5, 8, at=0.7) + 0.5 * wave(2, 3, 5, 8)
    _close(distances("l1-cosine", ours, theirs).mean(), wanted["loss"])
    _close(distances("l1-cosine", ours, theirs, cosine=0.0).mean(dim=(0, 2)), wanted["l1"])
    heads = PredictionHeads(6, 4, 3)
    with torch.no_grad():
        heads.expand.weight.copy_(wave(12, 6))
        heads.expand.bias.copy_(wave(12, at=2))
        heads.weight.copy_(wave(3, 4, 4).transpose(1, 2))  # theirs is (in, out)
        heads.bias.copy_(wave(3, 4, at=1))
    _close(heads(wave(2, 5, 6, at=3))[:, :, 1].transpose(0, 1), wanted["predicted"])


def test_pelas_losses():
    wanted = golden("pela")
    pairs = [(wave(2, 5, 8, at=i), wave(2, 5, 8, at=2 * i + 1)) for i in range(3)]
    _close(torch.stack([distances("mse", a, b).mean() for a, b in pairs]).mean(), wanted["features"])
    weights = [wave(12, 20), wave(16, 12, at=2)]
    made = [(SimpleNamespace(materialize=lambda p=p: torch.tensor(p)), w) for p, w in zip(wanted["products"], weights, strict=True)]
    for radius, expected in wanted["perturbation"].items():
        assert nearness(made, float(radius)).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bits", [None, 4, 2])
def test_cskvs_training_loss_and_its_gradients(bits):
    # Groups whose numbers have one sign are rounded otherwise (there: cut off); here none is.
    model = lw.edit.shrink_cache(decoder(1), density=0.375, key_share=1 / 3, start="svd", window=8, bits=bits)
    attention = model.stack.layers[0].mixer.branch
    with torch.no_grad():
        for factor, at in ((attention.k.factor_a, 4), (attention.k.factor_b, 5), (attention.v.factor_a, 6), (attention.v.factor_b, 7)):
            factor.copy_(0.4 * wave(*factor.shape, at=at))
    wanted = golden("cskv")["training"][str(bits or 16)]
    objective = CacheReconstruction()
    objective.attach(model, BATCH)
    loss = objective(model, BATCH)
    loss.mean.backward()
    loose = {} if bits is None else {"rtol": 2e-3, "atol": 2e-3}  # scales are kept in half precision here
    _close(loss.metrics["key_loss"] / loss.count, wanted["key"], **loose)
    _close(loss.metrics["value_loss"] / loss.count, wanted["value"], **loose)
    _close(attention.k.factor_a.grad[:, :5], wanted["key_a"], **loose)
    _close(attention.v.factor_a.grad[:, :5], wanted["value_a"], **loose)
    _close(attention.k.factor_b.grad[:5], wanted["key_b"], **loose)


def _routed():
    model = lw.edit.route_tokens(decoder(3), gap=0.5)
    with torch.no_grad():
        for i, layer in enumerate(model.stack.layers):
            layer.router.weight.copy_(0.5 * wave(1, 24, at=20 + i).view_as(layer.router.weight))
    return model


@pytest.mark.parametrize("labels", ["cos-global", "cos", "self"])
def test_dlos_losses_and_capacities(labels):
    wanted, gradients = golden("dlo")[labels], []
    for weight in (1.0, 0.0):
        model = _routed()
        objective = TokenRouterLM(None, capacity=0.6, labels=labels, weight=weight, anneal=0)
        objective.attach(model, BATCH)
        objective.before_step(0, 10, None)
        loss = objective(model, BATCH, torch.Generator())
        loss.mean.backward()
        gradients.append(model.stack.layers[1].router.weight.grad.flatten()[:8])
    _close(loss.metrics["router_loss"] / loss.count, wanted["router_loss"])
    _close(loss.metrics["lm_loss"] / loss.count, wanted["lm_loss"])
    assert loss.metrics["active"] / loss.count * 3 * 64 == sum(wanted["active"])
    _close(gradients[0] - gradients[1], wanted["gradient"])
    objective.before_step(1, 10, None)
    if wanted["capacities"] is not None:
        assert list(objective.capacities().values()) == pytest.approx(wanted["capacities"], abs=1e-6)


class Counted(Routing):
    def __init__(self):
        self.active = []

    def choose(self, layer, logits, real):
        chosen = BY_SIGN.choose(layer, logits, real)
        self.active.append(int(chosen.sum()))
        return chosen


def test_dlo_in_use_and_its_rates_by_layer():
    wanted, counted, model = golden("dlo"), Counted(), _routed()
    with torch.no_grad():
        made = model(BATCH, extras={ROUTING: counted})
    assert counted.active == wanted["use"]["active"]
    _close(made.hidden[1, 5, :8], wanted["use"]["stream"], atol=1e-4)
    # Theirs lists every layer's two groups of parameters.
    shares = [0.9, 0.5, 0.4]
    assert [c + 1 - sum(shares) / 3 for c in shares] == pytest.approx(wanted["rates"][::2])


def test_layerskips_dropout_and_curricula():
    wanted = golden("layerskip")
    policy = LayerDropout(rate=0.2, depths="exponential", scale=False)
    policy.before_step(SimpleNamespace(model=SimpleNamespace(stack=SimpleNamespace(depth=8)), step=0, total=100))
    assert policy.drop.rates == pytest.approx(wanted["dropout"], abs=1e-7)
    assert [enabled("rotational", 4, 8, step, 100) for step in range(6)] == wanted["rotational"]
    # Theirs turns the last layer on after T/2L steps, as one of L; in the paper and here it is on from the start, and all others come as much earlier.
    assert [enabled("gradual", 1, 8, step, 32) for step in range(18)] == wanted["gradual"][2:]
