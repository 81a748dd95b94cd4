"""Rotation, gradients, costs, attention entropy and layer dropping, against other ways to get the same numbers."""

import math

import pytest
import scipy.spatial.distance
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerwise.analyze.attention import layer_entropies
from layerwise.analyze.cost import FORMULAS, costs, size
from layerwise.analyze.gradients import gradient_norms, variation
from layerwise.analyze.overview import inspect
from layerwise.analyze.rotation import cosine_distance, kernels_by_depth, rotation
from layerwise.analyze.sensitivity import block_drop, block_sweep, layer_drop
from layerwise.edit.drop import choose_block, drop_layers
from layerwise.errors import BadInput
from layerwise.evaluate.language import language_modeling
from layerwise.jobs.fill import filled
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec


@pytest.fixture
def model():
    data = preset("decoder")
    data["stack"] |= {"depth": 4, "width": 16, "init_std": 0.2}
    data["stack"]["layer"] |= {"heads": 2}
    data["embedding"] = {"vocab": 262}
    return build(model_spec(data)).eval()


def test_cosine_distance_equals_scipy_and_its_limits():
    a, b = torch.randn(7, 9), torch.randn(7, 9)
    expected = scipy.spatial.distance.cosine(a.flatten().numpy(), b.flatten().numpy())
    assert cosine_distance(a, b) == pytest.approx(expected, abs=1e-6)
    assert cosine_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert cosine_distance(a, -a) == pytest.approx(2, abs=1e-12)
    assert cosine_distance(a, 5 * b) == pytest.approx(cosine_distance(a, b), abs=1e-7)


def test_rotation_takes_the_kernels_of_a_depth_as_one_vector_and_no_bias():
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    before = kernels_by_depth(net)
    assert [w.numel() for w in before.values()] == [15, 10]
    with torch.no_grad():
        net[0].weight.mul_(3)
        net[0].bias.add_(1)
        net[1].weight.add_(5)
        net[3].weight.neg_()
    turned = list(rotation(before, kernels_by_depth(net)).values())
    assert turned == pytest.approx([0, 2], abs=1e-9)


def test_convolution_kernel_is_one_vector():
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3))
    start = kernels_by_depth(conv)
    with torch.no_grad():
        conv[0].weight[0].neg_()
    w = start[min(start)].view(3, -1)
    expected = scipy.spatial.distance.cosine(w.flatten().numpy(), torch.cat([-w[:1], w[1:]]).flatten().numpy())
    assert rotation(start, kernels_by_depth(conv))[min(start)] == pytest.approx(expected, abs=1e-6)


def test_gradient_norms_equal_autograd_and_leave_no_gradient(model, text):
    found = gradient_norms(model, text, batches_at_most=1, batch=8)
    assert all(p.grad is None for p in model.parameters())
    from layerwise.objectives.language import CausalLM

    CausalLM()(model, text.train.batch(torch.arange(8))).mean.backward()
    for i, norm in found.tables[0].rows:
        if 0 <= i < 4:
            parts = [p.grad.norm() ** 2 for p in model.stack.layers[i].parameters()]
            assert norm == pytest.approx(math.sqrt(sum(parts)), rel=1e-5)
    assert found.metrics["grad_norm_variation"] == pytest.approx(variation([n for i, n in found.tables[0].rows if 0 <= i < 4]))
    assert variation([2.0, 2.0, 2.0]) == 0


def test_costs_add_up_to_the_whole_and_to_the_formula(model):
    batch = {"input_ids": torch.zeros(2, 10, dtype=torch.long)}
    table = costs(model, batch)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        _ = model(batch).logits
    assert sum(c.flops for c in table.values()) == counter.get_total_flops()
    assert sum(c.params for c in table.values()) == sum(p.numel() for p in model.parameters()) == size(model)["params"]
    linear = sum(p.numel() for p in model.stack.layers[0].parameters() if p.dim() == 2)
    attention = 2 * 2 * 2 * 10 * 10 * 16  # two products, a multiply-add is two, 2 rows, all heads together 16 wide
    assert table[0].flops == 2 * 20 * linear + attention
    assert table[4].flops == 2 * 20 * 16 * 262
    assert size(model.bfloat16())["bytes"] == 2 * size(model)["params"]


def test_uniform_attention_has_the_entropy_of_its_keys(model, text):
    with torch.no_grad():
        for layer in model.stack.layers:
            layer.mixer.branch.q.weight.zero_()
    expected = sum(math.log(n) for n in range(1, 33)) / 32
    assert layer_entropies(model, text, batches_at_most=1) == pytest.approx([expected] * 4, abs=1e-5)


def test_layer_drop_is_zero_for_an_identity_and_equals_dropping(model, text):
    with torch.no_grad():
        model.stack.layers[2].mixer.branch.o.weight.zero_()
        model.stack.layers[2].ffn.branch.down.weight.zero_()
    rows = layer_drop(model, text, batches_at_most=2).tables[0].rows
    assert rows[2][1] == 0
    whole = language_modeling(model, text, batches_at_most=2).metrics["val_loss"]
    for i, added in rows:
        cut = language_modeling(drop_layers(model, layers=[i]), text, batches_at_most=2).metrics["val_loss"]
        assert added == pytest.approx(cut - whole, abs=1e-6)


def test_block_sweep_finds_the_best_block_and_never_negative_regret(model, text):
    with torch.no_grad():
        for i in (1, 2):
            model.stack.layers[i].mixer.branch.o.weight.zero_()
            model.stack.layers[i].ffn.branch.down.weight.zero_()
    found = block_sweep(model, text, lengths=[1, 2, 3], samples=16, batches_at_most=2)
    by_length = {row[0]: dict(zip(found.tables[0].columns, row, strict=True)) for row in found.tables[0].rows}
    assert by_length[2]["angular: first"] == 1
    assert by_length[2]["angular"] == pytest.approx(found.metrics["whole_loss"], abs=1e-6)
    assert all(row["regret of angular"] >= 0 for row in by_length.values())
    assert [sum(v is not None for v in row) for row in found.matrices[0].values] == [4, 3, 2]
    with pytest.raises(BadInput, match="lengths are 1 to 3"):
        block_sweep(model, text, lengths=[4])


def test_block_drop_is_the_loss_after_the_rule_and_the_mean_for_random(model, text):
    options = {"count": 2, "batches_at_most": 2, "samples": 16}
    each = {}
    for first in range(3):
        cut = drop_layers(model, layers=[first, first + 1])
        each[first] = language_modeling(cut, text, batches_at_most=2).metrics["val_loss"]
    found = {rule: block_drop(model, text, rule=rule, **options).metrics["block_loss"] for rule in ("angular", "deepest", "random")}
    assert found["random"] == pytest.approx(sum(each.values()) / 3, abs=1e-6)
    assert found["deepest"] == pytest.approx(each[1], abs=1e-6)
    assert found["angular"] == pytest.approx(each[choose_block(model, text, count=2, samples=16)[0]], abs=1e-6)
    whole = block_drop(model, text, count=0).metrics
    assert whole["block_loss_added"] == 0


def test_inspect_names_embedding_and_head_and_leaves_the_model_as_it_was(model, text):
    before = {n: p.clone() for n, p in model.state_dict().items()}
    found = inspect(model, text, samples=8)
    assert [row[0] for row in found.tables[0].rows] == ["embedding", 0, 1, 2, 3, "head"]
    assert found.metrics["params"] == size(model)["params"]
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()) and not model.training


def test_inspect_neither_needs_nor_moves_the_running_statistics_of_batch_norms(digits):
    """A model that was just built is in training mode, where one row has no variance."""
    net = build(filled(model_spec(preset("mlp")), digits)).train()
    before = {n: p.clone() for n, p in net.state_dict().items()}
    found = inspect(net, digits, samples=8)
    assert found.metrics["params"] == size(net)["params"]
    assert net.training and all(torch.equal(p, before[n]) for n, p in net.state_dict().items())
