"""Factors of matrices and fused networks beside the numbers of published code."""

import pytest
import torch
from waves import golden, wave

from layerwise.edit.lowrank import rank_for
from layerwise.edit.merging.transport import ot_fuse
from layerwise.models.model import build
from layerwise.models.spec import model_spec
from layerwise.nn.linears.factors import activation_scales, svd_factors


def test_pelas_ranks_and_balanced_factors():
    wanted = golden("pela")
    for weight, rank, product, gram in zip(
        (wave(12, 20), wave(16, 12, at=2)), *(wanted[k] for k in ("ranks", "products", "grams")), strict=True
    ):
        assert rank_for(*weight.shape, 2) == rank
        b, a = svd_factors(weight, rank)
        torch.testing.assert_close(b @ a, torch.tensor(product), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.diagonal(a @ a.t()), torch.tensor(gram), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.diagonal(b.t() @ b), torch.tensor(gram), rtol=1e-4, atol=1e-5)


def test_cskvs_starts():
    wanted, weight = golden("cskv"), wave(16, 24)
    b, a = svd_factors(weight, 6)
    torch.testing.assert_close(b @ a, torch.tensor(wanted["svd"]), rtol=1e-4, atol=1e-5)
    b, a = svd_factors(weight, 6, activation_scales(wave(24, at=3).abs()))
    torch.testing.assert_close(b @ a, torch.tensor(wanted["asvd"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.diagonal(b.t() @ b), torch.tensor(wanted["asvd_grams"]), rtol=1e-4, atol=1e-5)


class Images:
    """Twenty images whose rows of pixels are waves."""

    def __init__(self):
        self.train = self

    def __len__(self):
        return 20

    def batch(self, rows):
        return {"pixel_values": wave(20, 64, at=1.0).view(20, 1, 8, 8)[rows]}


def _net(widths, at):
    layers = [{"kind": "dense", "norm": "none", "bias": False, "channels": c} for c in widths]
    head = {"kind": "classifier", "classes": 10, "bias": False}
    embedding = {"kind": "pixels", "channels": 1, "size": [8, 8], "flatten": True, "mean": 0.0, "std": 1.0}
    model = build(model_spec({"embedding": embedding, "stack": {"layers": layers, "inputs": 64}, "head": head})).eval()
    with torch.no_grad():
        for i, matrix in enumerate(_matrices(model)):
            matrix.copy_(0.4 * wave(*matrix.shape, at=at + i))
    return model


def _matrices(model):
    return [*(layer.weight.weight for layer in model.stack.layers), model.head.out.weight]


@pytest.mark.parametrize(
    ("case", "by", "widths", "at"),
    [("weights", "weights", (7, 5), 0.0), ("activations", "activations", (7, 5), 0.0), ("from_wide", "activations", (14, 10), 1.2)],
)
def test_ot_fusion_gives_the_weights_of_its_authors_code(case, by, widths, at):
    fused = ot_fuse(_net((7, 5), 2.5), Images(), other=_net(widths, at), by=by, samples=20)
    for made, wanted in zip(_matrices(fused), golden("otfusion")[case], strict=True):
        torch.testing.assert_close(made.detach()[:, :6], torch.tensor(wanted), rtol=1e-4, atol=2e-5)
