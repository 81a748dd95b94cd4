"""Probes of the stream and of gradients, against what a reader would compute by hand."""

import pytest
import torch

from layerwise.analyze.gradients import gradient_variance, matrix_gradients
from layerwise.analyze.stream import stream_variance, stream_variances
from layerwise.evaluate.batches import batches
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.objectives.language import CausalLM


def _model(depth=3, **layer):
    data = preset("decoder") | {"embedding": {"vocab": 262}}
    data["stack"] |= {"depth": depth, "width": 16, "init_std": 0.2}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    return build(model_spec(data), 0)


def test_stream_variances_of_a_stack_of_nothing_but_gates(text):
    """Card 108, check 5: with branches that write nothing, each gate multiplies the variance by its factor squared, twice a layer."""
    model = _model(stream_gate="gpas")
    with torch.no_grad():
        for layer in model.stack.layers:
            layer.mixer.branch.o.weight.zero_(), layer.ffn.branch.down.weight.zero_(), layer.gate.alpha.fill_(0.6)
    factor = model.stack.layers[0].gate.factor().item()
    values = stream_variances(model, text)
    for before, after in zip(values, values[1:], strict=False):
        assert after / before == pytest.approx(factor**4, rel=1e-5)
    found = stream_variance(model, text)
    assert found.metrics["gate_mean"] == pytest.approx(1 - factor, rel=1e-5) and found.metrics["gates_closing"] == 1
    assert found.metrics["stream_growth"] == pytest.approx(factor**8, rel=1e-5)


def test_stream_of_post_norm_layers_has_mean_square_one(text):
    """Card 031, check 3: whatever is below, the stream leaving a post-norm layer has root mean square 1."""
    model = _model(placement="post")
    from layerwise.stack.record import record

    rows = next(batches(text.train, 4, 1, torch.device("cpu")))
    for x in record(model, rows, hidden="all", inputs=[0]).stream()[1:]:
        torch.testing.assert_close(x.square().mean(-1), torch.ones(x.shape[:-1]), rtol=1e-4, atol=1e-4)


def test_gradient_variance_equals_all_gradients_kept(text):
    model = _model()
    found = gradient_variance(model, text, batch=4, batches_at_most=3)
    grads = []
    for rows in batches(text.train, 4, 3, torch.device("cpu")):
        model.zero_grad()
        CausalLM()(model, rows).mean.backward()
        grads.append(model.head.weight.grad.clone())
    grads = torch.stack(grads)
    norm = torch.stack([model.stack.norm.weight.grad])  # only its shape: it lies with the head
    assert norm.shape == (1, 16)
    head = (grads - grads.mean(0)).square().sum() / 3
    row = found.tables[0].rows[-1]
    assert row[0] == 3 and head.item() <= row[1] <= head.item() * 1.1
    assert 0 < found.metrics["head_variance_share"] < 1


def test_matrix_gradients(text):
    model = _model()
    rows = next(batches(text.train, 4, 1, torch.device("cpu")))
    CausalLM()(model, rows).mean.backward()
    expected = {i: layer.ffn.branch.down.weight.grad.abs().mean().item() for i, layer in enumerate(model.stack.layers)}
    assert matrix_gradients(model) == expected
