"""`layerwise inspect` and `convert` on models that read images."""

import math
from pathlib import Path

import pytest
import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers

from layerwise.analyze.overview import inspect
from layerwise.data.load import load_data
from layerwise.data.resize import resized
from layerwise.data.spec import DataSpec
from layerwise.errors import BadInput
from layerwise.jobs.inspection import convert_checkpoint, inspect_model
from layerwise.models.hf import import_hf

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16, "patch_size": 4}
MADE = {
    "vit": lambda: T.ViTForImageClassification(T.ViTConfig(**VIT, num_labels=3)),
    "beit-headless": lambda: T.BeitModel(T.BeitConfig(**VIT, use_relative_position_bias=True)),
    "resnet": lambda: T.ResNetForImageClassification(T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2])),
    "bit-headless": lambda: T.BitModel(T.BitConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=4)),
}


@pytest.mark.parametrize("name", MADE)
def test_inspect_has_a_row_a_layer(name: str, tmp_path: Path) -> None:
    MADE[name]().save_pretrained(tmp_path / "m")
    found, page = inspect_model(str(tmp_path / "m"), page=tmp_path / "page.html", samples=6)
    model = import_hf(tmp_path / "m")
    rows = found.tables[0].rows
    assert [row[0] for row in rows] == ["embedding", *range(model.stack.depth), "head"] and page.is_file()
    assert sum(row[1] for row in rows) == sum(p.numel() for p in model.parameters())
    inner = rows[1:-1]
    transformer = name in ("vit", "beit-headless")
    assert all((row[3] is not None) == transformer and (row[4] is not None) == transformer for row in inner)
    assert all(not transformer or 0 <= row[4] <= math.log(17) for row in inner)
    assert all((row[5] is not None) == (model.head is not None) for row in inner)
    assert ("flops_per_token" in found.metrics) == transformer


def test_operations_of_a_patch_model_are_those_of_its_matrices(tmp_path: Path) -> None:
    MADE["vit"]().save_pretrained(tmp_path / "m")
    model = import_hf(tmp_path / "m")
    data = resized(load_data(DataSpec(source="builtin:digits")), channels=3, size=(16, 16), classes=3, rows=8)
    rows = inspect(model, data, samples=2).tables[0].rows
    tokens, width, inner = 17, 16, 24
    whole = 2 * tokens * (4 * width * width + 2 * width * inner) + 2 * 2 * tokens * tokens * width
    assert rows[1][2] == round(whole / tokens)
    assert rows[0][2] == round(2 * 16 * width * 3 * 4 * 4 / tokens)  # 16 patches of 4 x 4 pixels in three colours
    assert rows[-1][2] == round(2 * width * 3 / tokens)


def test_inspect_looks_at_both_towers(tmp_path: Path) -> None:
    text = {**{k: v for k, v in VIT.items() if "size" not in k or k in ("hidden_size", "intermediate_size")}, "vocab_size": 40}
    config = T.CLIPConfig(text_config={**text, "max_position_embeddings": 9, "eos_token_id": 39}, vision_config=VIT, projection_dim=8)
    T.CLIPModel(config).save_pretrained(tmp_path / "m")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "the", "of", "and", "is"])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    found, _ = inspect_model(str(tmp_path / "m"), page=tmp_path / "page.html", samples=4)
    names = [row[0] for row in found.tables[0].rows]
    assert names == ["text embedding", "text 0", "text 1", "text head", "image embedding", "image 0", "image 1", "image head"]
    assert {"text.params", "image.params"} <= found.metrics.keys()


def test_text_is_refused_for_a_model_of_images(tmp_path: Path) -> None:
    MADE["vit"]().save_pretrained(tmp_path / "m")
    with pytest.raises(BadInput, match="reads images but builtin:docs is text"):
        inspect_model(str(tmp_path / "m"), page=tmp_path / "page.html", text="builtin:docs")


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_convert_there_and_back(name: str, tmp_path: Path) -> None:
    theirs = MADE[name]().eval()
    theirs.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    ours = convert_checkpoint(tmp_path / "m", tmp_path / "ours", to="layerwise")
    back = convert_checkpoint(ours, tmp_path / "back", to="hf")
    assert (back / "preprocessor_config.json").read_text() == '{"image_mean": [0.5, 0.5, 0.5]}'
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        loaded = type(theirs).from_pretrained(back).eval()
        assert torch.equal(loaded(pixels).logits, theirs(pixels).logits)
    half = convert_checkpoint(ours, tmp_path / "half", to="hf", dtype="bfloat16")
    assert import_hf(half).embedding.state_dict()[next(iter(import_hf(half).embedding.state_dict()))].dtype == torch.bfloat16


def test_resized_keeps_the_picture() -> None:
    data = load_data(DataSpec(source="builtin:digits"))
    large = resized(data, channels=3, size=(16, 16), classes=4, rows=10)
    batch, before = large.train.batch(torch.arange(10)), data.train.batch(torch.arange(10))
    assert batch["pixel_values"].shape == (10, 3, 16, 16) and torch.equal(batch["labels"], before["labels"] % 4)
    small = torch.nn.functional.avg_pool2d(batch["pixel_values"], 2)
    assert torch.corrcoef(torch.stack([small[:, 0].flatten(), before["pixel_values"].flatten()]))[0, 1] > 0.95
