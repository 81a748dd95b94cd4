"""Low-rank matrices in few bits: both factors packed, and what a plan of factors, bits and layers left alone comes to."""

import pytest
import torch

import layerwise as lw
from layerwise.edit.quantization.engine import Recipe, quantized_layers
from layerwise.edit.quantization.quantize import preview_quantize
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec


def _model():
    data = preset("decoder")
    data["stack"] |= {"depth": 3, "width": 48, "init_std": 0.3}
    data["stack"]["layer"] |= {"heads": 2, "ffn_width": 80}
    return build(model_spec({**data, "embedding": {"vocab": 262, "std": 0.5}})).eval()


@pytest.fixture(scope="module")
def thin():
    return lw.edit.factorize(_model(), rank=[12, None, 9])


def _error(model, other, text):
    ids = text.train.batch(torch.arange(8))
    with torch.no_grad():
        return float((model(ids).hidden - other(ids).hidden).square().mean())


def test_factors_are_quantized_and_the_rest_is_left(thin, text):
    made = lw.edit.quantize(thin, text, bits=[8, 16, 4], samples=8)
    kinds = [{linear.kind for linear in layer.linears.values()} for layer in made.spec.stack.layers]
    assert kinds == [{"packed-low-rank"}, set(), {"packed-low-rank"}]
    assert made.spec == preview_quantize(thin.spec, bits=[8, 16, 4])
    assert made.stack.layers[1].ffn.branch.up.weight is not None
    role = made.stack.layers[0].ffn.branch.up
    # 12 x 48 and 80 x 12 codes of a byte, a scale of two bytes and a zero of one for every row.
    assert role.bytes == 12 * 48 + 3 * 12 + 80 * 12 + 3 * 80


def test_more_bits_are_nearer(thin, text):
    errors = [_error(thin, lw.edit.quantize(thin, text, bits=b, samples=8), text) for b in (8, 4, 2)]
    # A bit less is twice the step and four times the squared error.
    assert errors[0] < errors[1] / 50 and errors[1] < errors[2]


def test_the_second_factor_is_rounded_on_what_the_rounded_first_one_makes(thin, text):
    nearest, gptq = (lw.edit.quantize(thin, text, bits=3, method=m, samples=64) for m in ("rtn", "gptq"))
    assert _error(thin, gptq, text) < _error(thin, nearest, text)


def test_the_engine_passes_on_what_the_packed_factors_compute(thin, text, tmp_path):
    made = lw.edit.quantize(thin, text, bits=4, samples=8)
    walk = list(quantized_layers(thin, text, [4] * 3, Recipe(), samples=8))
    for layer, rounded in zip(made.stack.layers, walk, strict=True):
        for role in ("q", "o"):
            ours = getattr(layer.mixer.branch, role).materialize()
            torch.testing.assert_close(ours, getattr(rounded.layer.mixer.branch, role).materialize(), atol=1e-5, rtol=1e-5)
    lw.save(made, tmp_path / "m")
    ids = text.train.batch(torch.arange(2))
    assert torch.equal(lw.load(tmp_path / "m")(ids).logits, made(ids).logits)
    merged = lw.edit.merge(made)
    torch.testing.assert_close(merged(ids).logits, made(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"rotate": "hadamard"}, {"scale": "awq"}, {"propagate": 0.5}])
def test_what_changes_dense_matrices_is_refused(thin, options):
    with pytest.raises(BadInput, match="low-rank linears"):
        preview_quantize(thin.spec, **options)
