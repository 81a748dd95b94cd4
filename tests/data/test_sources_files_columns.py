"""Reading sources: which files count, what is in their columns, how pictures are decoded, what is refused."""

import json
import time

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image

from layerwise.data.load import check_source, load_data
from layerwise.data.paths import data_files
from layerwise.data.sources import read_source
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.errors import BadInput

BYTES = TokenizerSpec("bytes")


def _jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


def _texts(folder, names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"This is what {name} says. " * 20)
    return DataSpec(source=f"path:{folder}", length=16, tokenizer=BYTES)


def _pictures(folder, count=8, make=lambda i: np.full((4, 5), i * 9, dtype=np.uint8)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(make(i)).save(folder / f"{i}.png")


def test_a_corpus_of_documents_is_not_taken_for_splits(tmp_path):
    names = ["development.txt", "testament.txt", "test.txt", "value.txt", "apple.txt", "zebra.txt"]
    raw = read_source(_texts(tmp_path / "essays", names))
    assert list(raw.splits) == ["train"] and len(raw.splits["train"]) == len(names)
    raw = read_source(_texts(tmp_path / "set", ["train.txt", "valid.txt", "test.txt"]))
    assert set(raw.splits) == {"train", "validation", "test"}


def test_a_named_file_is_for_training_whatever_its_name_but_a_folder_of_tests_is_not(tmp_path):
    _jsonl(tmp_path / "test.jsonl", [{"text": "a b c"}, {"text": "d"}])
    assert set(read_source(DataSpec(source=f"path:{tmp_path / 'test.jsonl'}")).splits) == {"train"}
    _jsonl(tmp_path / "val.jsonl", [{"text": "a b c"}] * 3)
    with pytest.raises(BadInput, match=r"has no training split; it has test, validation: name a file train\.jsonl"):
        check_source(DataSpec(source=f"path:{tmp_path}"))
    _texts(tmp_path / "texts", ["val.txt", "test.txt"])
    with pytest.raises(BadInput, match="has no training split"):
        check_source(DataSpec(source=f"path:{tmp_path / 'texts'}"))


def test_what_lies_beside_the_data_is_left_out(tmp_path):
    spec = _texts(tmp_path / "c", [f"{i}.txt" for i in range(6)])
    (tmp_path / "c" / "README.md").write_text("About these texts.")
    (tmp_path / "c" / ".git").mkdir()
    (tmp_path / "c" / ".git" / "notes.txt").write_text("not a document")
    Image.new("L", (4, 4)).save(tmp_path / "c" / "cover.png")
    assert [p.name for p in data_files(tmp_path / "c")] == [f"{i}.txt" for i in range(6)]
    assert read_source(spec).kind == "text"
    _pictures(tmp_path / "p")
    (tmp_path / "p" / "labels.txt").write_text("what the numbers mean")
    assert {p.suffix for p in data_files(tmp_path / "p")} == {".png"}


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfFirst.\r\nSecond.")
    assert read_source(DataSpec(source=f"path:{tmp_path / 'a.txt'}")).splits["train"].texts == ["First.\nSecond."]


def test_class_names_of_a_public_set_mean_the_same_everywhere(data_dir):
    if not (data_dir / "chemprot").is_dir():
        pytest.skip("chemprot is not in the data folder")
    data = load_data(DataSpec(source="chemprot", tokenizer=BYTES), data_dir)
    names = {s: pq.read_table(data_dir / "chemprot" / f"{s}.parquet")["label"].to_pylist() for s in ("train", "validation", "test")}
    numbers = {name: i for i, name in enumerate(sorted(set(names["train"])))}
    assert set(names["test"]) < set(numbers), "a split without one of the classes is what it takes"
    for split, expected in names.items():
        assert getattr(data, split).arrays["labels"].tolist() == [numbers[name] for name in expected]


def test_a_split_without_labels_among_others_with(tmp_path):
    datasets.Dataset.from_dict({"text": ["x"] * 4, "label": [0, 1] * 2}).to_parquet(tmp_path / "train.parquet")
    datasets.Dataset.from_dict({"text": ["x"] * 4}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(BadInput):
        load_data(DataSpec(source=f"path:{tmp_path}", tokenizer=BYTES))


def test_missing_texts_are_not_the_word_none(tmp_path):
    _jsonl(tmp_path / "a.jsonl", [{"text": t} for t in ("one", None, "  ", "two", "")])
    assert read_source(DataSpec(source=f"path:{tmp_path}")).splits["train"].texts == ["one", "two"]
    _jsonl(tmp_path / "a.jsonl", [{"text": t, "label": i} for i, t in enumerate(("one", None, "two"))])
    rows = read_source(DataSpec(source=f"path:{tmp_path}")).splits["train"]
    assert rows.texts == ["one", "", "two"] and rows.labels.tolist() == [0, 1, 2], "labels keep their texts"


def test_reading_leaves_nothing_behind_and_says_nothing(tmp_path, monkeypatch, capfd):
    _jsonl(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(5)])
    _pictures(tmp_path / "p")
    home = tmp_path / "huggingface"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home)
    for source in (tmp_path / "a.jsonl", tmp_path / "p"):
        read_source(DataSpec(source=f"path:{source}"))
    assert not home.exists() and capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled(), "only for that long"


def test_grey_and_coloured_pictures_go_together(tmp_path):
    grey, colour = (np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8) for shape in ((4, 5), (4, 5, 3)))
    _pictures(tmp_path / "p", make=lambda i: colour if i % 2 else grey + np.uint8(i))
    images = read_source(DataSpec(source=f"path:{tmp_path}/p")).splits["train"].images
    assert images.shape == (8, 3, 4, 5) and images.dtype == np.uint8
    assert np.array_equal(images[1], colour.transpose(2, 0, 1)) and np.array_equal(images[0], np.stack([grey] * 3))


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    _pictures(tmp_path / "p", make=lambda i: np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000 + i)
    images = read_source(DataSpec(source=f"path:{tmp_path}/p")).splits["train"].images
    assert images[0, 0].flatten().tolist() == [i * 3000 // 256 for i in range(20)]


def test_a_metadata_table_labels_its_pictures_and_the_cache_follows_it(tmp_path):
    _pictures(tmp_path / "p", 12)
    table, spec = tmp_path / "p" / "metadata.csv", DataSpec(source=f"path:{tmp_path}/p", validation=0.3)

    def labels(shift):
        table.write_text("file_name,label\n" + "\n".join(f"{i}.png,{(i + shift) % 4}" for i in range(12)) + "\n" * (shift + 1))
        train = load_data(spec, cache_dir=tmp_path / "cache").train
        return {int(image[0, 0, 0]) // 9: int(label) for image, label in zip(train.arrays["images"], train.arrays["labels"], strict=True)}

    for shift in (0, 1):
        found = labels(shift)
        assert found and all(label == (i + shift) % 4 for i, label in found.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenizerSpec("bpe", path="x.json"), "kind: file"),
        (lambda: TokenizerSpec("bpe", lowercase=True), "for wordpiece"),
        (lambda: DataSpec(columns={"txet": "body"}), "Did you mean 'text'"),
    ],
)
def test_settings_of_another_kind_are_refused(make, message):
    with pytest.raises(BadInput, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "builtin:docs", "columns": {"text": "body"}}, "no columns to name"),
        ({"source": "builtin:docs", "examples": 10}, r"use data\.documents"),
        ({"source": "builtin:digits", "documents": 10}, r"use data\.examples"),
        ({"source": "builtin:digits", "boundaries": True}, "has images, one a row"),
    ],
)
def test_options_without_an_effect_are_refused_before_reading(options, message):
    with pytest.raises(BadInput, match=message):
        check_source(DataSpec(**options))


def test_boundaries_are_for_packed_text(tmp_path):
    _jsonl(tmp_path / "a.jsonl", [{"text": f"x {i}", "label": i % 2} for i in range(20)])
    with pytest.raises(BadInput, match="texts with labels, one a row"):
        load_data(DataSpec(source=f"path:{tmp_path}", tokenizer=BYTES, boundaries=True))


def test_broken_files_say_what_the_parser_said(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(BadInput, match=r"cannot be read as parquet: .*[Pp]arquet"):
        load_data(DataSpec(source=f"path:{tmp_path / 'a.parquet'}"))


def test_no_network_is_found_out_at_once(monkeypatch):
    class ConnectError(Exception):
        pass

    def refuse(*_, **__):
        raise ConnectError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    began = time.monotonic()
    with pytest.raises(BadInput, match=r"hub:nobody/nothing could not be loaded .* needs a network; or download it once and use path:"):
        read_source(DataSpec(source="hub:nobody/nothing"))
    assert time.monotonic() - began < 5


def test_the_hub_is_asked_when_it_answers(monkeypatch):
    asked = []

    def load(*arguments):
        asked.append((*arguments, constants.HF_HUB_OFFLINE))
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"body": ["one", "two"]})})

    before = constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    raw = read_source(DataSpec(source="hub:someone/some-set:small", columns={"text": "body"}))
    assert raw.splits["train"].texts == ["one", "two"] and asked == [("someone/some-set", "small", before)]
