"""Learning rates over time and depth."""

import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from layerwise.errors import BadInput
from layerwise.optim.groups import check_options, make_optimizer, parameter_groups, set_lr
from layerwise.optim.schedule import factor
from layerwise.optim.spec import OptimizerSpec, ScheduleSpec


@pytest.mark.parametrize("warm", [0, 5])
@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_equals_transformers_schedules_after_the_warmup(name, warm):
    spec, total = ScheduleSpec(name, warmup=warm, floor=0.0), 40
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    make = {"cosine": get_cosine_schedule_with_warmup, "linear": get_linear_schedule_with_warmup}[name]
    theirs = make(optimizer, warm, total)
    for step in range(total):
        expected = theirs.get_last_lr()[0]
        # Ours warms up from 1/warmup, not from a first step that does nothing.
        assert factor(spec, step, total) == pytest.approx((step + 1) / warm if step < warm else expected, abs=1e-12)
        optimizer.step()
        theirs.step()


def test_wsd_constant_inverse_sqrt_and_drops():
    wsd = ScheduleSpec("wsd", warmup=10, decay=0.2, floor=0.0)
    assert [factor(wsd, s, 100) for s in (4, 9, 10, 79, 80)] == pytest.approx([0.5, 1, 1, 1, 1])
    assert factor(wsd, 90, 100) == pytest.approx(0.5)
    assert all(factor(ScheduleSpec("constant", warmup=0), s, 50) == 1 for s in range(50))
    root = ScheduleSpec("inverse-sqrt", warmup=16)
    assert factor(root, 15, 1000) == 1 and factor(root, 63, 1000) == pytest.approx(0.5)
    drops = ScheduleSpec("drops", warmup=0, drops={0.5: 0.1, 0.8: 0.5})
    assert [factor(drops, s, 10) for s in (4, 5, 8)] == pytest.approx([1, 0.1, 0.05])
    assert factor(ScheduleSpec("cosine", warmup=0.25), 24, 100) == pytest.approx(1)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "inverse-sqrt"])
def test_factor_is_within_zero_and_one_and_falls_after_the_warmup(name):
    values = [factor(ScheduleSpec(name, warmup=0.1, floor=0.1), s, 200) for s in range(200)]
    assert all(0 < v <= 1 + 1e-12 for v in values)
    assert all(a >= b - 1e-12 for a, b in zip(values[20:], values[21:], strict=False))


def test_groups_by_depth_on_a_foreign_model():
    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=50))
    groups = parameter_groups(model, OptimizerSpec(layer_decay=0.5, weight_decay=0.1, depth_lr={"1:2": 3.0}))
    by_parameter = {id(p): g for g in groups for p in g["params"]}
    assert len(by_parameter) == len(list(model.parameters()))
    scale = {name: by_parameter[id(p)]["lr_scale"] for name, p in model.named_parameters()}
    assert scale["embeddings.word_embeddings.weight"] == 0.5**4
    assert scale["encoder.layer.0.attention.self.query.weight"] == 0.5**3
    assert scale["encoder.layer.1.attention.self.query.weight"] == 3 * 0.5**2
    assert scale["encoder.layer.2.output.dense.weight"] == 0.5
    assert scale["pooler.dense.weight"] == 1.0
    assert by_parameter[id(model.pooler.dense.bias)]["weight_decay"] == 0


def test_set_lr_scales_every_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = make_optimizer(model, OptimizerSpec("sgd", lr=0.4, layer_decay=0.5))
    set_lr(optimizer, 0.5)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([0.05, 0.1])
    assert math.isclose(max(g["initial_lr"] for g in optimizer.param_groups), 0.2)


def test_frozen_model_and_unknown_options_are_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(BadInput, match="frozen"):
        make_optimizer(model, OptimizerSpec())
    with pytest.raises(BadInput, match="Did you mean 'betas'"):
        check_options(OptimizerSpec("adamw", options={"beta": 1}))
    with pytest.raises(BadInput, match="Did you mean 'adamw'"):
        OptimizerSpec("adamww")
