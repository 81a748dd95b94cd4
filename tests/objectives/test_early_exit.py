"""LayerSkip's training: the exact checks 1 to 3 of card 047."""

from types import SimpleNamespace

import pytest
import torch

from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.spec import model_spec
from layerwise.objectives.early_exit import EarlyExit, enabled, exit_weights
from layerwise.objectives.language import CausalLM
from layerwise.stack.around import StochasticDepth
from layerwise.train.policies.layer_dropout import LayerDropout

IDS = torch.randint(0, 50, (6, 12), generator=torch.Generator().manual_seed(0))


def _model(depth=4):
    layer = {"heads": 2, "causal": True, "position": "rotary"}
    return build(
        model_spec({"embedding": {"vocab": 50}, "stack": {"depth": depth, "width": 16, "layer": layer}, "head": {"kind": "lm"}}), 0
    )


def test_rates_rise_with_depth_and_time_from_0_to_the_whole():
    policy = LayerDropout(rate=0.3, depths="exponential", rising=True, scale=False)
    run = SimpleNamespace(model=_model(6), step=0, total=11)
    policy.start(run)
    assert policy.drop.rates == [0.0] * 6
    run.step = 10
    policy.before_step(run)
    assert policy.drop.rates[0] == 0 and policy.drop.rates[-1] == 0.3
    assert policy.drop.rates == pytest.approx([0.3 * (2 ** (i / 5) - 1) for i in range(6)])
    with pytest.raises(BadInput, match="rate"):
        LayerDropout(rate=1.5)


def test_weights_of_the_exits_are_the_papers():
    weights = exit_weights(8, 0.2, [True] * 8)
    e = torch.tensor([0, 0.2, 0.6, 1.2, 2, 3, 4.2, 11.2])
    torch.testing.assert_close(torch.tensor(weights), e / e.sum())
    assert weights[-1] == pytest.approx(0.5)


@pytest.mark.parametrize("depth", [1, 2, 5, 8])
@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "none"])
def test_weights_sum_to_one_in_every_state_of_a_curriculum(curriculum, depth):
    for step in range(20):
        on = enabled(curriculum, 3, depth, step, 20)
        assert on[-1] and sum(exit_weights(depth, 0.2, on)) == pytest.approx(1)


def test_curricula_rotate_and_widen():
    seen = [enabled("rotational", 4, 8, t, 100) for t in range(4)]
    assert all(sum(on[:-1]) in (1, 2) for on in seen) and [sum(on[i] for on in seen) for i in range(7)] == [1] * 7
    assert enabled("gradual", 1, 8, 0, 160) == [False] * 7 + [True]
    assert [sum(enabled("gradual", 1, 8, t, 160)) for t in (0, 9, 10, 20, 80)] == [1, 1, 2, 3, 8]


def test_the_last_layer_alone_is_plain_training_bitwise():
    plain, exits = _model(), _model()
    objective = EarlyExit(curriculum="gradual")
    objective.before_step(0, 100, None)
    a, b = CausalLM()(plain, {"input_ids": IDS}).total, objective(exits, {"input_ids": IDS}).total
    a.backward(), b.backward()
    assert torch.equal(a, b)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), exits.parameters(), strict=True))
    assert not list(objective.parameters())


def test_the_loss_is_the_weighted_sum_through_final_norm_and_head():
    model = _model().double()
    objective = EarlyExit(curriculum="none", scale=0.7)
    weights = exit_weights(4, 0.7, [True] * 4)
    expected = 0.0
    for layers, weight in zip(range(1, 5), weights, strict=True):
        logits = model({"input_ids": IDS}, path=list(range(layers))).logits[:, :-1]
        expected += weight * torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(objective(model, {"input_ids": IDS}).total, expected)


def test_dropped_samples_pass_bitwise_and_kept_ones_are_as_without_dropping():
    model = _model(1).double().train()
    x = torch.randn(64, 5, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    model.stack.norm = None
    from layerwise.stack.context import Context

    whole = model.stack(x, Context())
    torch.manual_seed(3)
    made = model.stack(x, Context(around=(StochasticDepth([0.5], scale=False),)))
    same = (made == x).flatten(1).all(dim=1)
    assert 10 < same.sum() < 54
    torch.testing.assert_close(made[~same], whole[~same], rtol=1e-12, atol=1e-12)
    model.eval()
    assert torch.equal(model.stack(x, Context(around=(StochasticDepth([0.5], scale=False),))), whole)
