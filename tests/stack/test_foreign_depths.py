"""What acts by depth works on a network of another library: learning rates, rotation, gradient norms."""

import pytest
import torch

from layerwise.analyze.gradients import depth_gradient_norms
from layerwise.analyze.rotation import kernels_by_depth, rotation
from layerwise.optim.groups import make_optimizer, parameter_groups, set_lr
from layerwise.optim.spec import OptimizerSpec
from layerwise.stack.depth import depth_of


@pytest.fixture
def falcon():
    import transformers as t

    torch.manual_seed(0)
    return t.FalconForCausalLM(t.FalconConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=3, vocab_size=40))


def test_learning_rates_follow_the_depth(falcon):
    depths = depth_of(falcon)
    groups = parameter_groups(falcon, OptimizerSpec(layer_decay=0.5, depth_lr={"-1": 0.1}))
    scale_of = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    for name, parameter in falcon.named_parameters():
        expected = 0.5 ** (3 - depths[name]) * (0.1 if depths[name] == 2 else 1.0)
        assert scale_of[id(parameter)] == pytest.approx(expected)


def test_rotation_and_gradient_norms_by_layer(falcon):
    start = kernels_by_depth(falcon)
    ids = torch.arange(12).view(2, 6)
    optimizer = make_optimizer(falcon, OptimizerSpec("sgd", lr=0.5, depth_lr={"0": 1e-9}))
    falcon(ids, labels=ids).loss.backward()
    norms = depth_gradient_norms(falcon)
    by_hand = sum(p.grad.double().square().sum() for n, p in falcon.named_parameters() if depth_of(falcon)[n] == 1) ** 0.5
    assert norms[1] == pytest.approx(float(by_hand), rel=1e-5)
    set_lr(optimizer, 1.0)
    optimizer.step()
    turned = rotation(start, kernels_by_depth(falcon))
    assert turned[0] < 1e-7 < turned[1], "a layer whose learning rate is next to nothing stays where it is"
