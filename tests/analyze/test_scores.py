"""Scores of layers."""

from typing import get_args

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.analyze.scores import Score, cosine, layer_scores, rounded, unusual
from layerwise.edit.drop import choose_block
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.objectives.language import CausalLM
from layerwise.stack.record import record
from layerwise.stack.surgery import replace


def _model():
    data = preset("decoder")
    data["stack"] |= {"depth": 3, "width": 32, "init_std": 0.2}
    data["stack"]["layer"] |= {"heads": 2}
    return build(model_spec({**data, "embedding": {"vocab": 256, "std": 0.5}})).eval()


def _silent(layer):
    for side in (layer.mixer.branch.o, layer.ffn.branch.down):
        nn.init.zeros_(side.weight)


def test_bits_1_modification_is_minus_the_cosine_and_an_identity_layer_has_minus_one(text):
    model = _model()
    _silent(model.stack.layers[1])
    for by in ("input-modification", "token-modification"):
        scores = layer_scores(model, text, by, samples=8, batch=8)
        assert all(-1 - 1e-12 <= s <= 1 for s in scores) and min(scores) == scores[1] == pytest.approx(-1, abs=1e-12)
    starts = torch.arange(0, len(text.train), 8)[0]
    stream = record(model, text.train.batch(starts + torch.arange(8)), hidden="all", inputs=[0]).stream()
    a, b = stream[0].flatten(1), stream[1].flatten(1)
    expected = -torch.nn.functional.cosine_similarity(a.double(), b.double()).mean().item()
    assert layer_scores(model, text, "input-modification", samples=8, batch=8)[0] == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(cosine(a, 3.7 * b), cosine(a, b))


def test_bits_2_z_scores_do_not_depend_on_scale_and_shift():
    w = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    assert unusual(w) == pytest.approx(0.1587, abs=2e-3) and unusual(w, absolute=True) == pytest.approx(0.3173, abs=3e-3)
    assert unusual(2.0 * w.double() + 3.0) == unusual(w) and unusual(torch.full((4, 4), 0.1)) == 0.0
    heavy = torch.cat([torch.zeros(90), torch.full((10,), 5.0)])
    assert unusual(heavy) == pytest.approx(0.1)


def test_taylor_and_gradient_norm_are_those_of_autograd(text):
    model = _model()
    rows = text.train.batch(torch.arange(8))
    CausalLM()(model, rows, torch.Generator()).mean.backward()
    layer = model.stack.layers[1]
    taylor = sum((p.detach() * p.grad).abs().sum().item() for p in layer.parameters())
    norm = sum(p.grad.square().sum().item() for p in layer.parameters()) ** 0.5
    model.zero_grad(set_to_none=True)
    assert layer_scores(model, text, "taylor", samples=8, batch=8)[1] == pytest.approx(taylor, rel=1e-4)
    assert layer_scores(model, text, "gradient-norm", samples=8, batch=8)[1] == pytest.approx(norm, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_the_table_has_every_score_of_every_layer(text):
    table = lw.analyze.layer_importance(_model(), text, samples=8, batch=8).tables[0]
    assert table.columns == ["layer", *get_args(Score)] and [r[0] for r in table.rows] == [0, 1, 2]
    with pytest.raises(BadInput, match="scored by"):
        layer_scores(_model(), text, "taste")


def test_quantization_error_is_that_of_each_layer_alone(text):
    model = _model()
    model.stack.layers[2].ffn.branch.up.weight.data[:, 0] *= 50  # one range a row now has little left for the other numbers
    found = layer_scores(model, text, "quantization-error", samples=8, batch=8, bits=3)
    rows = text.train.batch(torch.arange(8))
    stream = record(model, rows, hidden="all", inputs=[0]).stream()
    errors = []
    for i in range(3):
        alone = model.with_stack(replace(model.stack, i, rounded(model.stack.layers[i], 3)))
        y, z = stream[i + 1].double(), record(alone, rows, hidden="all", inputs=[0]).stream()[i + 1].double()
        errors.append(((z - y).square().sum() / y.square().sum()).item())
    assert found == pytest.approx(errors, rel=1e-6)
    assert found[2] > 1.2 * layer_scores(_model(), text, "quantization-error", samples=8, batch=8, bits=3)[2]
    assert layer_scores(model, text, "quantization-error", samples=8, batch=8, bits=8)[1] < found[1] / 100


def test_layer_drop_is_the_loss_without_the_layer(text):
    model = _model()
    _silent(model.stack.layers[1])
    found = layer_scores(model, text, "layer-drop", samples=16, batch=8)
    expected = lw.analyze.layer_drop(model, text, split="train", batch=8, batches_at_most=2).tables[0]
    assert found == pytest.approx([r[1] for r in expected.rows], abs=1e-6) and found[1] == 0


def test_distances_are_mean_norms_of_what_a_layer_adds(text):
    model = _model()
    rows = text.train.batch(torch.arange(8))
    stream = record(model, rows, hidden="all", inputs=[0]).stream()
    change = stream[1] - stream[0]
    assert layer_scores(model, text, "euclidean-change", samples=8, batch=8)[0] == pytest.approx(
        change.norm(dim=-1).mean().item(), rel=1e-5
    )
    assert layer_scores(model, text, "manhattan-change", samples=8, batch=8)[0] == pytest.approx(
        change.abs().sum(-1).mean().item(), rel=1e-5
    )
    _silent(model.stack.layers[2])
    assert layer_scores(model, text, "euclidean-change", samples=8, batch=8)[2] == 0


@pytest.mark.parametrize("by", get_args(Score))
def test_layers_are_dropped_and_given_bits_by_any_score(text, by):
    model = _model()
    scores = layer_scores(model, text, by, samples=16)
    least = min(range(3), key=lambda i: (scores[i], -i))
    assert choose_block(model, text, count=1, rule=by, samples=16) == [least]
    dropped = lw.edit.drop_layers(model, text, count=1, rule=by, samples=16)
    assert [id(layer) for layer in dropped.stack.layers] == [id(layer) for i, layer in enumerate(model.stack.layers) if i != least]
    found = lw.edit.quantize(model, text, method="rtn", bits=8, low_bits=2, mean_bits=6.0, by=by, samples=16).spec.stack.layers
    assert [layer.linears["q"].bits for layer in found] == [2 if i == least else 8 for i in range(3)]
