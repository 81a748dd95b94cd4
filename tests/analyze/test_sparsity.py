"""Sizes of weights: what a cut would take, by hand and by cutting."""

import math

import pytest
import torch

from layerwise.analyze.sparsity import weight_sizes
from layerwise.edit.prune.magnitude import kernels, prune_magnitude
from layerwise.models.model import build
from layerwise.models.spec import model_spec


@pytest.fixture
def model():
    spec = {"embedding": {"kind": "pixels", "channels": 1, "size": [4, 4], "flatten": True}, "head": {"kind": "classifier", "classes": 3}}
    spec["stack"] = {"layers": [{"kind": "dense", "channels": 8, "norm": "none", "bias": True}], "inputs": 16}
    return build(model_spec(spec), 0)


def test_the_mass_of_a_cut_is_what_cutting_takes(model):
    found = weight_sizes(model, ratio=5)

    def square(network):
        return sum(float(p.detach().double().square().sum()) for p in kernels(network).values())

    cut = prune_magnitude(model, ratio=5)
    assert found.metrics["cut_mass"] == pytest.approx(1 - square(cut) / square(model))
    left = {row[0]: row[1] for row in found.tables[0].rows}
    assert left == {n: int(torch.count_nonzero(p)) for n, p in kernels(cut).items()}
    assert sum(found.matrices[0].values[0]) == sum(p.numel() for p in kernels(model).values())


def test_the_gap_is_that_of_two_groups(model):
    with torch.no_grad():
        for p in kernels(model).values():
            p.fill_(1e-4)
        model.head.out.weight.fill_(1e-1)
    found = weight_sizes(model, ratio=(128 + 24) / 24).metrics
    assert found["size_gap"] == pytest.approx(math.log10(1e3), abs=1e-5)
    assert found["cut_mass"] == pytest.approx(128e-8 / (128e-8 + 24e-2), rel=1e-4)
