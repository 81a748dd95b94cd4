"""Random layerwise token dropping: the exact checks of card 115."""

from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from layerwise.analyze.cost import Operations
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.spec import model_spec
from layerwise.optim.schedule import factor
from layerwise.optim.spec import ScheduleSpec
from layerwise.train.loop import train
from layerwise.train.policies.random_ltd import RandomLTD
from layerwise.train.spec import TrainSpec

IDS = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(0))


def _model(causal=True, depth=4, **layer):
    around = {"heads": 2, "causal": causal, "position": "rotary", **layer}
    return build(model_spec({"embedding": {"vocab": 50}, "stack": {"depth": depth, "width": 16, "layer": around}}), 0).double().train()


def _policy(model, step=0, total=10, length=16, seed=0, **options):
    policy = RandomLTD(**{"keep": 4, "increment": 2, **options})
    run = SimpleNamespace(model=model, data=SimpleNamespace(train=SimpleNamespace(tokens_per_row=length)), device=torch.device("cpu"))
    run.seed, run.step, run.total, run.clock = seed, step, total, float(step)
    policy.start(run)
    policy.before_step(run)
    return policy, run


def _naive(model, policy, ids):
    """Check 3: out = H.clone(); out[idx] = layer(H[idx]), row by row, at the true positions."""
    x = model.embedding({"input_ids": ids}, torch.arange(ids.shape[1])[None])
    from layerwise.stack.context import Context

    for i, layer in enumerate(model.stack.layers):
        rows = []
        for b in range(len(x)):
            index = policy._drawn[policy.layers.index(i), b] if i in policy.layers else torch.arange(x.shape[1])
            ctx = Context(positions=index[None])
            ctx.begin(x[b : b + 1, index], None)
            out = x[b].clone()
            out[index] = layer(x[b : b + 1, index], ctx, (i, 0))[0]
            rows.append(out)
        x = torch.stack(rows)
    return model.stack.norm(x)


@pytest.mark.parametrize("causal", [True, False])
def test_outputs_and_gradients_are_those_of_the_plain_loop(causal):
    model = _model(causal)
    policy, _ = _policy(model)
    made = model({"input_ids": IDS}, around=policy.around).hidden
    expected = _naive(model, policy, IDS)
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn(made.shape, dtype=made.dtype, generator=torch.Generator().manual_seed(1))
    names = [n for n, p in model.named_parameters() if "head" not in n]
    grads = [
        torch.autograd.grad((out * direction).sum(), [p for n, p in model.named_parameters() if n in names]) for out in (made, expected)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_dropped_positions_pass_and_subsets_differ():
    """Check 2."""
    model = _model()
    policy, _ = _policy(model)
    boundaries = []

    def keep(i, layer, x, ctx, call):
        boundaries.append(x)
        return call(x, ctx)

    model({"input_ids": IDS}, around=(keep, *policy.around))
    drawn = policy._drawn
    for position, i in enumerate(policy.layers):
        for b in range(3):
            left = torch.ones(16, dtype=torch.bool)
            left[drawn[position, b]] = False
            assert torch.equal(boundaries[i][b, left], boundaries[i + 1][b, left])
    assert drawn.shape == (2, 3, 4) and (drawn.diff(dim=2) > 0).all(), "r distinct indices, rising"
    assert len({tuple(d.tolist()) for d in drawn.flatten(0, 1)}) > 4, "layers and samples have subsets of their own"
    same, _ = _policy(model, same=True)
    model({"input_ids": IDS}, around=same.around)
    assert same._drawn.shape[0] == 1


def test_every_position_is_kept_equally_often():
    """Check 2, chi-square over many draws."""
    model = _model()
    counts = torch.zeros(16)
    policy, run = _policy(model, total=400)
    for run.step in range(400):
        policy.before_step(run)
        policy._kept = 4
        counts += torch.bincount(policy._subset(1, 3, 16).flatten(), minlength=16)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_with_all_tokens_and_in_evaluation_nothing_changes():
    """Check 1."""
    model = _model()
    whole, _ = _policy(model, keep=16, full_at=0.0)
    few, _ = _policy(model)
    plain = model({"input_ids": IDS}).hidden
    assert torch.equal(model({"input_ids": IDS}, around=whole.around).hidden, plain)
    model.eval()
    assert torch.equal(model({"input_ids": IDS}, around=few.around).hidden, plain)


def test_no_position_sees_a_later_one():
    """Check 4."""
    model = _model()
    policy, run = _policy(model)
    changed = IDS.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    outs = []
    for ids in (IDS, changed):
        policy.before_step(run)
        outs.append(model({"input_ids": ids}, around=policy.around).hidden)
    assert torch.equal(outs[0][:, :9], outs[1][:, :9]) and not torch.equal(outs[0][:, 9:], outs[1][:, 9:])


def test_padding_stays_hidden_from_the_tokens_that_are_kept():
    """Check 7: real tokens among the kept ones see what they would see alone."""
    model = _model(causal=False, position="none")
    policy, run = _policy(model)
    mask = torch.ones(3, 16, dtype=torch.long)
    mask[:, 12:] = 0
    other = IDS.clone()
    other[:, 12:] = 7
    outs = []
    for ids in (IDS, other):
        policy.before_step(run)
        outs.append(model({"input_ids": ids, "attention_mask": mask}, around=policy.around).hidden[:, :12])
    assert torch.equal(*outs)


def test_the_number_kept_rises_in_increments_to_all():
    """Check 5."""
    policy = RandomLTD(keep=13, increment=8, full_at=0.75)
    kept = [policy.kept(t, 100, 64) for t in range(100)]
    assert kept[0] == 8 and kept == sorted(kept) and all(k % 8 == 0 for k in kept) and kept[75:] == [64] * 25
    assert {RandomLTD(keep=24, full_at=0).kept(t, 100, 64) for t in range(100)} == {24}


def test_layer_tokens_are_the_closed_sum_and_drive_the_learning_rate():
    """Check 6."""
    model = _model()
    policy, run = _policy(model, total=20)
    consumed = [sum(policy.kept(t, 20, 16) * 2 + 16 * 2 for t in range(n)) for n in range(21)]
    for run.step in range(20):
        policy.before_step(run)
        assert run.clock == pytest.approx(consumed[run.step] / consumed[20] * 20)
    assert policy.findings().metrics == {"layer_token_share": consumed[20] / (16 * 4 * 20)}
    plain, run = _policy(model, total=20, keep=16, full_at=0.0)
    schedule = ScheduleSpec("cosine", warmup=4)
    for run.step in range(20):
        plain.before_step(run)
        assert factor(schedule, run.clock, 20) == pytest.approx(factor(schedule, run.step, 20))


def test_it_trains_and_says_what_it_saved(text):
    model = build(
        model_spec({"embedding": {"vocab": text.vocab}, "stack": {"depth": 3, "width": 16, "layer": {"heads": 2, "causal": True}}}), 0
    )
    policies = ({"name": "random-ltd", "keep": 8}, {"name": "layer-cost"})
    found = train(model, text, TrainSpec("causal-lm", steps=6, batch=4, policies=policies)).findings.metrics
    assert 0.6 < found["layer_token_share"] < 1
    assert found["layer_tokens"] == found["layer_token_share"] * 6 * 4 * text.train.tokens_per_row * 3
    with pytest.raises(BadInput, match="no layer to drop tokens in"):
        RandomLTD().start(SimpleNamespace(model=_model(depth=2), data=None))
    with pytest.raises(BadInput, match="keeps 64 tokens of rows that have 16"):
        _policy(_model(), keep=64)


def test_a_dropping_layer_costs_its_share_of_operations():
    """Check 8: (r/s)^2 of attention, r/s of everything else."""
    model = _model(depth=3)

    def cost(kept, only):
        policy, _ = _policy(model, keep=kept, full_at=0.0, increment=1)
        seen = []

        def count(i, layer, x, ctx, call):
            with Operations() as operations:
                made = call(x, ctx)
            seen.append(operations.total)
            return made

        model({"input_ids": IDS}, around=(*policy.around, count))
        return seen[only]

    with_attention = {r: cost(r, 1) for r in (4, 8, 16)}
    scores = {r: 2 * 2 * 3 * r * r * 16 for r in (4, 8, 16)}  # two products, rows, pairs, width
    for r in (4, 8):
        assert with_attention[r] - scores[r] == (with_attention[16] - scores[16]) * r / 16
    assert cost(4, 0) == cost(16, 0), "the first layer sees all tokens"
