"""Which rows are chosen, what reaches a batch, and a cache that cannot be written."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from layerwise.data.load import _split as splits_from
from layerwise.data.load import load_data
from layerwise.data.raw import Raw, Rows
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.data.tokenizer import encoded, make_tokenizer
from layerwise.errors import BadInput

BYTES = TokenizerSpec("bytes")
TEXTS = [f"Chapter {i} tells of " + ", ".join(f"thing {i * j}" for j in range(1, i % 7 + 4)) + "." for i in range(50)]


def _raw(texts, labels=None):
    return Raw("text", "some texts", {"train": Rows(texts=list(texts), labels=None if labels is None else np.array(labels))})


def _corpus(folder, **options):
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02d}.txt").write_text(text)
    return DataSpec(**{"source": f"path:{folder}", "length": 16, "tokenizer": BYTES, **options})


def test_fewer_documents_are_among_more_and_too_many_are_refused():
    def chosen(count, seed=0):
        splits = splits_from(_raw(TEXTS), DataSpec(documents=count, seed=seed))
        return set(splits["train"].texts) | set(splits["validation"].texts)

    assert len(chosen(5)) == 5 and chosen(5) < chosen(12) and chosen(12) != chosen(12, seed=1)
    with pytest.raises(BadInput, match="asks for 51 documents; some texts has 50"):
        chosen(51)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=20, max_size=60), st.integers(2, 12), st.integers(0, 9))
def test_examples_are_spread_over_the_classes(labels, count, seed):
    texts = [f"{i}" for i in range(len(labels))]
    spec = DataSpec(examples=count, seed=seed, validation=0.01)
    train = splits_from(_raw(texts, labels), dataclasses.replace(spec, examples=None))["train"]
    rows = splits_from(_raw(texts, labels), spec)["train"]
    assert len(rows) == count and all(labels[int(t)] == label for t, label in zip(rows.texts, rows.labels, strict=True))
    have, there = np.bincount(rows.labels, minlength=4), np.bincount(train.labels, minlength=4)
    # No class has two more than another, unless the other has no more to give.
    assert all(have[a] <= have[b] + 1 or have[b] == there[b] for a in range(4) for b in range(4))


def test_pictures_without_labels_can_be_counted_too():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    raw = Raw("images", "pictures", {"train": Rows(images=images)})
    assert len(splits_from(raw, DataSpec(examples=7))["train"]) == 7


def test_the_tokenizer_never_sees_validation(tmp_path):
    data = load_data(_corpus(tmp_path / "c", tokenizer=TokenizerSpec("bpe", vocab=400)))
    alone = make_tokenizer(TokenizerSpec("bpe", vocab=400), data.train.documents())
    assert data.tokenizer.to_str() == alone.to_str()
    assert alone.to_str() != make_tokenizer(TokenizerSpec("bpe", vocab=400), TEXTS).to_str(), "the test can tell"


def test_documents_of_a_split_are_the_rows_of_it(tmp_path):
    data = load_data(_corpus(tmp_path / "c"))
    (first, *_) = encoded(data.tokenizer, data.train.documents())
    row = data.train.batch(torch.tensor([0]))["input_ids"][0]
    assert row.tolist() == first[:16].tolist()
    assert data.documents("validation") == data.validation.documents() and load_data(DataSpec("builtin:digits")).train.documents() == []
    with pytest.raises(BadInput, match="has no test split"):
        data.documents("test")


def test_batches_equal_the_rows_one_by_one(tmp_path):
    for spec in (_corpus(tmp_path / "c", boundaries=True), DataSpec("builtin:digits")):
        split = load_data(spec).train
        index = torch.tensor([3, 0, 3])
        together = split.batch(index)
        for name, values in together.items():
            assert torch.equal(values, torch.cat([split.batch(index[i : i + 1])[name] for i in range(3)]))
    assert together["pixel_values"].dtype == torch.float32 and together["labels"].dtype == torch.long
    assert (together["pixel_values"] * 255).round().equal(torch.from_numpy(split.arrays["images"][index.numpy()]).float())


def test_boundaries_need_an_end_token(tmp_path):
    Tokenizer(models.WordLevel({"[UNK]": 0, "thing": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    spec = _corpus(tmp_path / "c", tokenizer=TokenizerSpec("file", path=str(tmp_path)), length=2, boundaries=True)
    with pytest.raises(BadInput, match="has no end token"):
        load_data(spec)


def test_a_text_without_tokens_still_attends_to_something(tmp_path):
    Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    rows = [{"text": "" if i % 2 else "a", "label": i % 2} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = DataSpec(source=f"path:{tmp_path / 'train.jsonl'}", length=4, tokenizer=TokenizerSpec("file", path=str(tmp_path)))
    data = load_data(spec)
    for split in (data.train, data.validation):
        assert (split.batch(torch.arange(len(split)))["attention_mask"].sum(dim=1) == 1).all()


def test_a_bpe_without_merges_is_not_taken_for_bytes():
    tokenizer = make_tokenizer(TokenizerSpec("bpe", vocab=300), ["a", "b"])
    assert tokenizer.get_vocab_size() == 262, "as many tokens as the bytes tokenizer has"
    (ids,) = encoded(tokenizer, ["ba\n"])
    assert ids.tolist() == tokenizer.encode("ba\n").ids and tokenizer.decode(ids.tolist()) == "ba\n"


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="cannot be kept in"):
        data = load_data(_corpus(tmp_path / "c"), cache_dir=tmp_path / "cache")
    assert len(data.train) > 0


def test_cached_rows_stay_on_the_disk(tmp_path):
    spec = _corpus(tmp_path / "c")
    first, second = (load_data(spec, cache_dir=tmp_path / "cache").train.arrays["rows"] for _ in range(2))
    assert isinstance(second, np.memmap) and np.array_equal(first, second) and second.dtype == np.uint16
