"""Singular values of keys and values: against the decomposition itself, and with keys that have few directions."""

import types
from typing import Any

import pytest
import torch

import layerwise as lw

LAYER = {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 4, "ffn_width": 32}


def _data(ids: torch.Tensor) -> Any:
    class Rows:
        def __len__(self) -> int:
            return len(ids)

        def batch(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"input_ids": ids[index]}

    return types.SimpleNamespace(train=None, validation=Rows(), test=None)


def test_lost_shares_are_those_of_the_singular_values() -> None:
    model = lw.load("decoder", embedding={"vocab": 40, "std": 1.0}, stack={"depth": 2, "width": 16, "init_std": 0.2, "layer": LAYER}).eval()
    with torch.no_grad():  # values of the second layer have two directions
        weight = model.stack.layers[1].mixer.branch.v.weight
        weight.copy_(weight[:, :2] @ weight[:2])
    ids = torch.randint(40, (6, 20), generator=torch.Generator().manual_seed(0))
    kept: list[torch.Tensor] = []
    hooks = [
        layer.mixer.branch.k.register_forward_hook(lambda _m, _g, made: kept.append(made.flatten(0, 1))) for layer in model.stack.layers
    ]
    with torch.no_grad():
        model({"input_ids": ids})
    for hook in hooks:
        hook.remove()
    found = lw.analyze.cache_spectrum(model, _data(ids), batch=4)
    squares = [torch.linalg.svdvals(k.double()).square() for k in kept]
    lost = [(s[8:].sum() / s.sum()).item() for s in squares]
    assert found.metrics["key_lost_half"] == pytest.approx(sum(lost) / 2, rel=1e-6)
    table = found.tables[0].rows
    assert [row[2] for row in table] == pytest.approx(lost, rel=1e-6)
    assert table[1][4] <= 2
    assert table[1][6] == pytest.approx(0.0, abs=1e-9)
