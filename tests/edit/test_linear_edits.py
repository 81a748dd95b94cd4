"""Packing a model's matrices and making them dense again."""

import pytest
import torch

import layerwise as lw
from layerwise.analyze.ledger import parameter_bytes
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.linear import Linear
from layerwise.nn.nf4 import dequantize, quantize

IDS = torch.arange(24).view(2, 12) % 64


def _model(**layer):
    data = preset("decoder")
    data["stack"] |= {"depth": 2, "width": 64}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    return build(model_spec({**data, "embedding": {"vocab": 64}})).eval()


def test_quantizing_packs_the_matrices_and_merging_gives_the_dequantized_ones():
    model = _model()
    packed = lw.edit.quantize_nf4(model, double=True)
    merged = lw.edit.merge(packed)
    old = model.stack.layers[0].ffn.branch.up.weight
    torch.testing.assert_close(
        merged.stack.layers[0].ffn.branch.up.weight, dequantize(quantize(old, 64, True), tuple(old.shape)), atol=0, rtol=0
    )
    torch.testing.assert_close(merged({"input_ids": IDS}).logits, packed({"input_ids": IDS}).logits, atol=1e-5, rtol=1e-4)
    assert merged.spec.stack.layers == model.spec.stack.layers and packed.spec.stack.layers[0].linears["q"].kind == "nf4"
    linears = [m for m in packed.modules() if isinstance(m, Linear)]
    dense = sum(m.in_features * m.out_features for m in linears)
    assert 8 * sum(m.bytes for m in linears) / dense < 4.2
    assert parameter_bytes(packed) < parameter_bytes(model) - 3.4 * dense


@pytest.mark.parametrize("kind", ["sparse-low-rank", "loqt", "qlora", "low-rank"])
def test_saved_models_keep_packed_storage_and_compute_the_same(kind, tmp_path):
    model = _model(linears={"*": {"kind": kind, "rank": 4}})
    lw.save(model, tmp_path / "m")
    back = lw.load(tmp_path / "m")
    assert torch.equal(back({"input_ids": IDS}).logits, model({"input_ids": IDS}).logits)
    assert {n: t.dtype for n, t in back.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    small = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert small < parameter_bytes(model) + 20_000
    with pytest.raises(BadInput, match="edit: merge"):
        lw.export(model, tmp_path / "hf", format="hf")
    merged = lw.edit.merge(model)
    torch.testing.assert_close(merged({"input_ids": IDS}).logits, model({"input_ids": IDS}).logits, atol=1e-4, rtol=1e-4)
    lw.export(merged, tmp_path / "hf", format="hf")


def test_low_rank_terms_beside_packed_matrices_change_nothing_at_first_and_are_all_that_is_trained():
    model = _model()
    packed = lw.edit.quantize_nf4(model)
    tuned = lw.edit.quantize_nf4(model, rank=2)
    assert torch.equal(tuned({"input_ids": IDS}).logits, packed({"input_ids": IDS}).logits)
    assert all(".lora_" in n for n, p in tuned.named_parameters() if p.requires_grad)
    with pytest.raises(BadInput, match="merge them first"):
        lw.edit.quantize_nf4(tuned)
