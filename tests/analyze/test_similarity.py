"""Cards 029 and 031: the angular distance and the block it picks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerwise.analyze.similarity import angle, angular_distance, best_block, block_distances, distances
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.stack.record import record


def _model(depth=5, seed=0):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 16}
    data["stack"]["layer"] |= {"heads": 2}
    data["stack"]["init_std"] = 0.3
    data["embedding"] = {"vocab": 262}
    return build(model_spec(data), seed).eval()


def _silence(model, layers):
    """Make layers exact identities: nothing is written into the stream."""
    with torch.no_grad():
        for i in layers:
            model.stack.layers[i].mixer.branch.o.weight.zero_()
            model.stack.layers[i].ffn.branch.down.weight.zero_()


vectors = st.lists(st.floats(-10, 10), min_size=4, max_size=4).filter(lambda v: np.linalg.norm(v) > 1e-3)


@given(vectors, vectors, st.floats(0.01, 100))
def test_angle_is_bounded_symmetric_and_blind_to_length(a, b, scale):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    d = angle(a, b).item()
    assert -1e-12 <= d <= 1 + 1e-12
    assert angle(b, a).item() == pytest.approx(d, abs=1e-12)
    assert angle(scale * a, b).item() == pytest.approx(d, abs=1e-9)
    assert angle(a, a).item() == 0
    assert angle(a, -a).item() == pytest.approx(1, abs=1e-12)


def test_angle_values():
    x, y = torch.tensor([1.0, 0]), torch.tensor([0, 2.0])
    assert angle(x, y).item() == pytest.approx(0.5, abs=1e-15)
    assert angle(x, torch.tensor([1.0, 1.0])).item() == pytest.approx(0.25, abs=1e-15)
    cosine = 0.3
    assert angle(x, torch.tensor([cosine, math.sqrt(1 - cosine**2)])).item() == pytest.approx(math.acos(cosine) / math.pi, abs=1e-7)


def test_angle_of_nearly_parallel_vectors_keeps_its_digits():
    tiny = 1e-7
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([math.cos(tiny), math.sin(tiny)], dtype=torch.float64)
    assert angle(a, b).item() == pytest.approx(tiny / math.pi, rel=1e-6)
    assert torch.isfinite(angle(a.bfloat16(), a.bfloat16()))


def test_every_block_is_a_candidate():
    matrix = torch.rand(6, 6)
    for n in range(6):
        assert len(block_distances(matrix, n)) == 5 - n + 1


def test_distances_equal_a_naive_loop_over_samples(text):
    model = _model()
    matrix = distances(model, text, samples=10_000, batch=7, split="validation")
    rows = torch.arange(len(text.validation))
    expected = np.zeros((6, 6))
    for row in rows:
        stream = record(model, text.validation.batch(row[None]), hidden="all", inputs=[0]).stream()
        last = [x[0, -1].double().numpy() for x in stream]
        for i, a in enumerate(last):
            for j, b in enumerate(last):
                expected[i, j] += math.acos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)) / math.pi
    np.testing.assert_allclose(matrix.numpy(), expected / len(rows), atol=1e-6)
    assert torch.equal(matrix, matrix.T) and torch.equal(matrix.diagonal(), torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("first", [0, 1, 3])
def test_identity_layers_have_distance_zero_and_are_picked(text, first):
    model = _model()
    _silence(model, [first, first + 1])
    matrix = distances(model, text, samples=8)
    assert matrix[first, first + 2] == 0
    assert best_block(matrix, 2) == first


def test_only_the_last_real_token_counts(text):
    model = _model()
    ids = text.train.batch(torch.arange(4))["input_ids"]

    class Padded:
        kind = "text"

        def __init__(self, fill):
            self.fill = fill
            self.train = self

        def __len__(self):
            return 4

        def batch(self, index):
            mask = torch.ones_like(ids)
            mask[:, 20:] = 0
            return {"input_ids": ids.masked_fill(mask == 0, self.fill)[index], "attention_mask": mask[index]}

    torch.testing.assert_close(distances(model, Padded(7)), distances(model, Padded(200)), rtol=0, atol=1e-7)


def test_findings_have_every_block_and_every_layer(text):
    found = angular_distance(_model(), text, samples=8)
    layers, blocks = found.tables
    assert [r[0] for r in layers.rows] == [0, 1, 2, 3, 4]
    assert [r[0] for r in blocks.rows] == [1, 2, 3, 4]
    (matrix,) = found.matrices
    assert sum(v is not None for row in matrix.values for v in row) == 5 + 4 + 3 + 2 + 1
    assert found.metrics["angular_distance_deep"] == pytest.approx(layers.rows[-1][1])
