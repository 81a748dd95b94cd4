"""Loss against bits by layer, and the error that quantized layers leave in the stream."""

import inspect

import pytest
import torch

import layerwise as lw
from layerwise.analyze.scores import layer_order
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec


def _model(depth=3):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 32, "init_std": 0.3}
    data["stack"]["layer"] |= {"heads": 2, "ffn_width": 64}
    return build(model_spec({**data, "embedding": {"vocab": 262, "std": 0.5}})).eval()


LOSS = {"batch": 8, "batches_at_most": 2}


def _loss(model, data, **options):
    return lw.evaluate.language_modeling(model, data, **LOSS, **options).metrics["val_loss"]


def test_the_curve_holds_the_losses_of_the_models_it_speaks_of(text):
    model = _model()
    order = layer_order(model, text, "input-modification", samples=8)
    table = lw.analyze.bits_curve(model, text, samples=8, **LOSS).tables[0]
    assert [row[:2] for row in table.rows] == [[0, 4.0], [1, pytest.approx(10 / 3)], [2, pytest.approx(8 / 3)], [3, 2.0]]
    for k, _, loss in table.rows:
        plan = [2 if i in order[3 - k :] else 4 for i in range(3)]
        assert loss == pytest.approx(_loss(lw.edit.quantize(model, method="rtn", bits=plan), text), rel=1e-6)


def test_bits_7_removed_layers_are_dropped_layers(text):
    model = _model()
    order = layer_order(model, text, "z-score")
    table = lw.analyze.bits_curve(model, text, by="z-score", remove=True, samples=8, **LOSS).tables[0]
    for k, _, loss in table.rows:
        assert loss == pytest.approx(_loss(lw.edit.drop_layers(model, layers=order[3 - k :]), text), rel=1e-6)
    with pytest.raises(BadInput, match="stack of 3"):
        lw.analyze.bits_curve(model, text, lowered=[4])


def test_chance_is_the_mean_over_several_orders(text):
    model = _model()
    orders = [layer_order(model, text, "random", seed=d) for d in range(3)]
    losses = [_loss(lw.edit.quantize(model, method="rtn", bits=[2 if i == o[-1] else 4 for i in range(3)]), text) for o in orders]
    found = lw.analyze.bits_curve(model, text, by="random", draws=3, lowered=[1], samples=8, **LOSS).metrics["curve_loss"]
    assert found == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_the_stream_error_is_that_between_the_two_models(text):
    model = _model()
    options = {"bits": [3, 3, 16], "method": "rtn", "propagate": 0.5, "samples": 8, "batch": 4}
    found = lw.analyze.quantization_error(model, text, **options)
    packed = lw.edit.quantize(model, text, **options)
    rows = text.train.batch(torch.randperm(len(text.train), generator=torch.Generator().manual_seed(0))[:8])
    with torch.no_grad():
        a, b = (lw.record(m, rows, hidden="all", inputs=[0]).stream() for m in (model, packed))
    for i, _, error in found.tables[0].rows:
        expected = (a[i + 1] - b[i + 1]).square().sum() / a[i + 1].square().sum()
        assert error == pytest.approx(expected.item(), rel=1e-4)
    assert found.metrics["stream_error"] == found.tables[0].rows[-1][2]


def test_the_stream_error_knows_every_option_of_the_edit_and_a_rotation_leaves_it_where_nothing_is_rounded(text):
    model = _model()
    edit, analysis = (
        {n for n, p in inspect.signature(f).parameters.items() if p.kind is p.KEYWORD_ONLY}
        for f in (lw.edit.quantize, lw.analyze.quantization_error)
    )
    assert edit - analysis == {"low_bits", "mean_bits", "by", "reverse"} and analysis <= edit
    options = {"bits": [16, 16, 3], "method": "rtn", "group": 8, "samples": 8, "rotate": "random"}
    rows = lw.analyze.quantization_error(model, text, **options).tables[0].rows
    assert rows[0][2] == rows[1][2] == 0.0 and 0 < rows[2][2] < 0.2
