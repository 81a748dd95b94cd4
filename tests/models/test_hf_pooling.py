"""How a checkpoint of sentence-transformers makes one vector of a text: read from its settings, kept, and as that library does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.infer.sentences import sentence_embeddings
from layerwise.models.checkpoint import load, save
from layerwise.models.hf import export_hf, import_hf
from layerwise.models.load import described

IDS = torch.tensor([[5, 9, 3, 0, 0], [7, 2, 8, 1, 4]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
FORMER = {
    "cls": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "lasttoken": "lasttoken",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stack = {"depth": 2, "width": 16, "layer": {"heads": 2}, "init_std": 0.5}
    return export_hf(lw.load("bert", head=None, embedding={"vocab": 262, "max_length": 16}, stack=stack), tmp_path / "hf")


def pooled_by(folder: Path, settings: Any) -> Any:
    """The checkpoint with these settings of pooling."""
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return import_hf(folder)


@pytest.mark.parametrize("former", [False, True])
@pytest.mark.parametrize("mode", ["cls", "max", "mean", "lasttoken"])
def test_a_text_becomes_the_vector_that_sentence_transformers_makes(mode: str, former: bool, folder: Path, tmp_path: Path) -> None:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    settings = {f"pooling_mode_{key}": name == mode for name, key in FORMER.items()} if former else {"pooling_mode": mode}
    model = pooled_by(folder, {"word_embedding_dimension": 16, **settings})
    out = model.eval()({"input_ids": IDS, "attention_mask": MASK})
    theirs = modules.Pooling(16, mode)({"token_embeddings": out.hidden, "attention_mask": MASK})["sentence_embedding"]
    torch.testing.assert_close(out.pooled, theirs)
    kept = load(save(model, tmp_path / "ours"))
    assert kept.spec == model.spec == described(folder)
    assert json.loads((export_hf(kept, tmp_path / "back") / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert import_hf(tmp_path / "back").spec == model.spec


def test_sentences_are_embedded_as_the_model_pools(folder: Path, text: Any) -> None:
    model = pooled_by(folder, {"pooling_mode": "max"})
    texts = ["a fox", "the wall lets it pass"]
    own, largest, mean = (sentence_embeddings(model, text.tokenizer, texts, length=8, how=how) for how in (None, "max", "mean"))
    assert torch.equal(own, largest) and not torch.allclose(own, mean)


def test_without_settings_it_is_the_mean(folder: Path) -> None:
    assert import_hf(folder).spec.pool == "mean"


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling_mode": "weightedmean"},
        {"pooling_mode": ["cls", "mean"]},
        {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
        {"pooling_mode_mean_sqrt_len_tokens": True},
        {"pooling_mode": 3},
        {"pooling_mode": [["mean"]]},
        [],
    ],
)
def test_other_ways_are_read_and_refused_when_the_vector_is_asked_for(settings: Any, folder: Path) -> None:
    model = pooled_by(folder, settings)
    assert model.spec.pool is None
    out = model({"input_ids": IDS})
    assert out.hidden.shape == (2, 5, 16)
    with pytest.raises(BadInput, match="1_Pooling/config.json"):
        _ = out.pooled
