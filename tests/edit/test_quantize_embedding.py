"""Packed tables of tokens: the numbers of the grid, the bytes that were promised, back to dense, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import layerwise as lw
from layerwise.edit.linears import merge
from layerwise.edit.quantization.tables import quantize_embedding
from layerwise.errors import BadInput
from layerwise.models.hf import export_hf
from layerwise.nn.integers import find_grid

IDS = torch.randint(0, 50, (2, 10), generator=torch.Generator().manual_seed(0))


def encoder(width: int = 20, **more: Any) -> Any:
    stack = {"depth": 2, "width": width, "layer": {"heads": 4, "ffn_width": 24}}
    return lw.load("bert", seed=1, embedding={"vocab": 50}, stack=stack, head=None, **more).eval()


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group", [None, 8])
def test_vectors_are_the_nearest_of_the_grid_and_nothing_else_changes(bits: int, group: int | None) -> None:
    model = encoder()
    weight = model.token_matrix.detach()
    grid = find_grid(weight, bits, group, stored=torch.float32)
    packed = quantize_embedding(model, bits=bits, group=group)
    assert torch.equal(packed.embedding.tokens(IDS), grid.values(grid.nearest(weight))[IDS])
    again = merge(packed)
    assert again.spec.embedding.table == "learned" and torch.equal(again.token_matrix, packed.embedding.tokens.matrix())
    assert torch.equal(again({"input_ids": IDS}).hidden, packed({"input_ids": IDS}).hidden)
    assert torch.equal(packed.embedding.positions.weight, model.embedding.positions.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_kept_in_as_many_bytes_and_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    packed = quantize_embedding(encoder().to(dtype), bits=3, group=8)
    assert packed.embedding.tokens(IDS).dtype == dtype
    lw.save(packed, tmp_path / "kept")
    stored = {n: t for n, t in load_file(tmp_path / "kept" / "model.safetensors").items() if n.startswith("embedding.tokens.")}
    # 20 numbers of 3 bits fill 9 bytes (24 numbers) a row; three groups have a scale and a zero each.
    assert sum(t.numel() * t.element_size() for t in stored.values()) == 50 * (9 + 3 * (dtype.itemsize + 1))
    back = lw.load(tmp_path / "kept").eval()
    assert back.spec == packed.spec and torch.equal(back({"input_ids": IDS}).hidden, packed({"input_ids": IDS}).hidden)
    assert not back.embedding.tokens.scales.requires_grad


def test_models_whose_head_reads_the_table_and_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="reads the whole table"):
        quantize_embedding(lw.load("bert", embedding={"vocab": 50}, stack={"depth": 1, "width": 16, "layer": {"heads": 2}}))
    with pytest.raises(BadInput, match="2, 3, 4 or 8 bits"):
        quantize_embedding(encoder(), bits=5)
    packed = quantize_embedding(encoder())
    with pytest.raises(BadInput, match="learned token vectors"):
        quantize_embedding(packed)
    with pytest.raises(BadInput, match="merge it first"):
        export_hf(packed, tmp_path / "out")
    export_hf(merge(packed), tmp_path / "out")
