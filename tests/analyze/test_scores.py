"""Scores of layers."""

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.analyze.scores import cosine, layer_scores, unusual
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.objectives.language import CausalLM
from layerwise.stack.record import record


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
    assert table.columns[0] == "layer" and len(table.columns) == 8 and [r[0] for r in table.rows] == [0, 1, 2]
    with pytest.raises(BadInput, match="scored by"):
        layer_scores(_model(), text, "taste")
