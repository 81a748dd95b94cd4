"""The ledger of bytes and operations: what it counts on networks small enough to count by hand."""

import dataclasses
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from layerwise.analyze.cost import FORMULAS, Operations
from layerwise.analyze.ledger import (
    LiveGradients,
    SavedTensors,
    gradient_bytes,
    parameter_bytes,
    saved_bytes,
    state_bytes,
    state_floats,
    tensor_bytes,
)
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.optim.spec import OptimizerSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec

X = torch.randn(10, 8)


def _mlp(depth):
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(8, 8, bias=False), nn.Tanh())])


def test_a_storage_counts_once_and_whole():
    big = torch.zeros(100)
    assert tensor_bytes([big, big[:3], {"again": big.view(10, 10)}]) == 400
    assert tensor_bytes(big[:3]) == 400, "the slice keeps all of it alive"
    assert tensor_bytes([torch.zeros(3, dtype=torch.uint8), (torch.zeros(2, dtype=torch.bfloat16), 7)]) == 7
    tied = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    tied[1].weight = tied[0].weight
    tied.register_buffer("codes", torch.zeros(5, dtype=torch.int8))
    assert parameter_bytes(tied) == 8 * 8 * 4 + 5


def test_gradients_and_optimizer_state():
    net = _mlp(2)
    assert gradient_bytes(net) == 0
    net(X).sum().backward()
    assert gradient_bytes(net) == parameter_bytes(net) == 2 * 256
    adam, sgd = torch.optim.Adam(net.parameters()), torch.optim.SGD(net.parameters(), momentum=0.9)
    assert state_bytes(adam) == 0
    adam.step(), sgd.step()
    assert state_floats(adam) == 2 * 128 and state_floats(sgd) == 128
    assert state_bytes(adam) == 2 * 512 + 2 * 4, "one step counter a parameter"
    assert state_bytes(sgd) == 512


@pytest.mark.parametrize("depth", [1, 3])
def test_saved_tensors_by_hand(depth):
    net = _mlp(depth)
    # tanh saves its output, which is the next linear's input: one (10, 8) a layer, and the first layer saves X only if it needs it.
    assert saved_bytes(lambda: net(X), net.parameters()) == (depth + 1) * 320
    assert saved_bytes(lambda: net(X)) == (depth + 1) * 320 + depth * 256 - 256 * (depth >= 1), "the first weight is not needed: X is data"


def test_the_peak_over_depth_is_one_layer_when_layers_are_trained_one_by_one():
    net = _mlp(6)

    def layerwise():
        x = X
        for linear, act in zip(net[::2], net[1::2], strict=True):
            x = act(linear(x.detach()))
            x.sum().backward()

    assert saved_bytes(lambda: net(X).sum().backward(), net.parameters()) == 7 * 320
    assert saved_bytes(layerwise, net.parameters()) <= 3 * 320


def test_saved_tensors_are_released_by_backward_and_checkpointing_saves_less():
    net = _mlp(6)
    with SavedTensors(net.parameters()) as saved:
        loss = net(X).sum()
        whole = saved.now
        loss.backward()
        del loss
        gc.collect()
        assert saved.now == 0 and saved.peak == whole
    x = X.clone().requires_grad_()
    blocks = [net[i : i + 2] for i in range(0, 12, 2)]

    def recomputed():
        y = x
        for block in blocks:
            y = checkpoint(block, y, use_reentrant=False)
        y.sum().backward()

    assert saved_bytes(recomputed, net.parameters()) < saved_bytes(lambda: net(x).sum().backward(), net.parameters())


def test_live_gradients_see_that_freed_ones_never_meet():
    net = _mlp(4)
    with LiveGradients(net.parameters()) as live:
        net(X).sum().backward()
    assert live.peak == parameter_bytes(net)
    net.zero_grad()

    def use(parameter):
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(use) for p in net.parameters()]
    with LiveGradients(net.parameters()) as live:
        net(X).sum().backward()
    assert live.peak == 256, "one layer's"
    assert gradient_bytes(net) == 0 and len(hooks) == 4


def _model(depth=2):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 16}
    data["stack"]["layer"] |= {"heads": 2}
    data["embedding"] = {"vocab": 262}
    return build(model_spec(data))


@pytest.mark.parametrize("every", [1, 3])
def test_the_policy_measures_a_stage_and_changes_nothing(text, every):
    plain, measured = _model(), _model()
    spec = TrainSpec("causal-lm", steps=4, batch=4, optimizer=OptimizerSpec("adam"))
    train(plain, text, spec)
    found = train(measured, text, dataclasses.replace(spec, policies=({"name": "ledger", "every": every},))).findings
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), measured.parameters(), strict=True))
    params = sum(p.numel() for p in plain.parameters())
    assert found.metrics["param_bytes"] == found.metrics["grad_bytes"] == 4 * params
    assert found.metrics["optimizer_bytes"] == 8 * params + 4 * len(list(plain.parameters()))
    assert found.metrics["state_bytes"] == found.metrics["param_bytes"] * 4 + 4 * len(list(plain.parameters()))
    tokens = 4 * 4 * text.train.tokens_per_row
    weights = sum(p.numel() for n, p in plain.named_parameters() if p.dim() >= 2 and not n.startswith("embedding"))
    unscored = 16 * 16 * 262  # the last token of each of the sixteen rows
    scores = 2 * 16 * text.train.tokens_per_row * tokens * 2  # one product in both layers: two forward, five backward
    assert found.metrics["train_flops"] == 6 * weights * tokens - 6 * unscored + 7 * scores
    by_formula = {row[0]: row[2] for row in found.tables[-1].rows}
    assert by_formula["optimizer state (bytes)"] == 8 * params
    assert by_formula["operations of the stage"] == 6 * weights * tokens


def test_operations_are_those_of_pytorchs_counter():
    model, ids = _model(), torch.arange(64).view(2, 32)

    def step():
        model({"input_ids": ids}).logits.logsumexp(dim=-1).sum().backward()

    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as theirs:
        step()
    with Operations() as ours:
        step()
    assert ours.total == theirs.get_total_flops() > 0


def test_activation_bytes_grow_with_depth(text):
    sizes = []
    for depth in (1, 2, 3):
        spec = TrainSpec("causal-lm", steps=1, batch=2, policies=({"name": "ledger"},))
        sizes.append(train(_model(depth), text, spec).findings.metrics["activation_bytes"])
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0
