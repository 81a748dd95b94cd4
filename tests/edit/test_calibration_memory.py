"""What the calibration engine holds: the activations between two layers, however deep the model, or none of them with `spill`."""

import gc

import pytest
import torch

import layerwise as lw
from layerwise.edit.quantization.engine import Recipe, quantized_layers

WIDTH, SAMPLES, LENGTH = 40, 16, 32
STREAM = SAMPLES * LENGTH * WIDTH * 4


def _alive():
    """Bytes of all tensors of the shape of activations."""
    found = {t.data_ptr(): t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor and t.dim() == 3 and t.shape[-1] == WIDTH}
    return sum(found.values())


@pytest.mark.parametrize(("spill", "reference", "held"), [(False, False, 1), (False, True, 2), (True, True, 0)])
def test_between_two_layers_only_their_activations_are_held(spill, reference, held, text):
    gc.collect()
    for depth in (2, 4):
        model = lw.load("decoder", stack={"depth": depth, "width": WIDTH}, embedding={"vocab": 262})
        before = _alive()
        sizes = [
            _alive() - before
            for _ in quantized_layers(model, text, [4] * depth, Recipe(), samples=SAMPLES, batch=4, spill=spill, reference=reference)
        ]
        assert sizes == [held * STREAM] * depth
        assert _alive() == before
