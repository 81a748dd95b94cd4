"""Data: splits by document, order, packing, tokenizers, masking, caching, and what is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import layerwise.data.load as loading
from layerwise.data.load import check_source, load_data, segments
from layerwise.data.masking import mask_tokens
from layerwise.data.order import Order
from layerwise.data.pack import packed, padded
from layerwise.data.spec import AugmentSpec, DataSpec, TokenizerSpec
from layerwise.data.tokenizer import encoded, make_tokenizer
from layerwise.errors import BadInput

BYTES = TokenizerSpec("bytes")
TEXTS = [f"Document number {i}: " + "something to say. " * (i % 5 + 3) for i in range(40)]


@given(st.integers(1, 30), st.integers(1, 50), st.integers(0, 2**31), st.integers(0, 40))
def test_epochs_are_permutations_one_after_another(rows, batch, seed, step):
    order = Order(rows, batch, seed)
    walked = torch.cat([order.indices(i) for i in range(step + 1)])
    for epoch in range(len(walked) // rows):
        assert sorted(walked[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))
    assert torch.equal(Order(rows, batch, seed).indices(step), walked[-batch:]), "a step needs no history"


def test_seeds_and_epochs_give_other_orders():
    first = Order(50, 50, 1)
    assert not torch.equal(first.indices(0), first.indices(1)) and not torch.equal(first.indices(0), Order(50, 50, 2).indices(0))


def test_masking_hides_what_it_should():
    ids = torch.randint(0, 100, (64, 128), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    real[:, 100:] = 0
    special = torch.tensor([0, 1, 2])
    options = {"rate": 0.2, "mask_id": 3, "vocab": 100, "special_ids": special, "attention_mask": real}
    hidden, labels = mask_tokens(ids, **options, generator=torch.Generator().manual_seed(1))
    chosen = labels != -100
    assert not (chosen & (torch.isin(ids, special) | (real == 0))).any()
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(hidden[~chosen], ids[~chosen])
    eligible = (~torch.isin(ids, special) & (real == 1)).sum()
    assert chosen.sum() / eligible == pytest.approx(0.2, abs=0.02)
    masked, kept = (hidden[chosen] == 3).float().mean(), (hidden[chosen] == ids[chosen]).float().mean()
    assert masked == pytest.approx(0.8, abs=0.04) and kept == pytest.approx(0.11, abs=0.03)
    again, _ = mask_tokens(ids, **options, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, hidden)
    _, labels = mask_tokens(ids[:1, :3] % 90 + 5, rate=1e-9, mask_id=3, vocab=100, special_ids=special)
    assert (labels != -100).sum() == 1, "a batch always has a label"


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["<eos>", "a<pad><mask>b", "<unk>"]))
def test_byte_level_tokenizers_lose_nothing(kind, text):
    tokenizer = _tokenizer(kind)
    (ids,) = encoded(tokenizer, [text])
    assert ids.min(initial=9) >= 6, "a text never holds a special token, whatever it spells"
    assert tokenizer.decode(ids.tolist()) == text


_MADE = {}


def _tokenizer(kind):
    if kind not in _MADE:
        _MADE[kind] = make_tokenizer(TokenizerSpec(kind, vocab=400), TEXTS)
    return _MADE[kind]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "bytes"])
def test_tokenizers_are_deterministic_and_their_specials_come_first(kind, tmp_path):
    a, b = (make_tokenizer(TokenizerSpec(kind, vocab=400), TEXTS) for _ in range(2))
    assert a.to_str() == b.to_str()
    assert [a.token_to_id(t) for t in ("<pad>", "<eos>", "<unk>", "<mask>", "<cls>", "<sep>")] == list(range(6))
    a.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs.encode(TEXTS[3]) == a.encode(TEXTS[3]).ids
    assert [list(x) for x in encoded(a, TEXTS)] == [a.encode(t, add_special_tokens=False).ids for t in TEXTS]


def test_packing_equals_a_loop_and_padding_frames():
    documents = [np.arange(n, dtype=np.uint32) + 10 for n in (3, 0, 7, 1)]
    flat = []
    for d in documents:
        flat += [*d.tolist(), 1]
    made = packed(documents, 4, 1, 100)
    assert made.flatten().tolist() == flat[: len(flat) // 4 * 4] and made.dtype == np.uint16
    assert packed(documents, 4, None, 70_000).dtype == np.uint32
    rows, lengths = padded(documents, 5, 0, 4, 5, 100)
    assert rows.tolist() == [[4, 10, 11, 12, 5], [4, 5, 0, 0, 0], [4, 10, 11, 12, 5], [4, 10, 5, 0, 0]] and lengths.tolist() == [5, 2, 5, 3]


def test_segments_number_documents_and_restart_positions():
    found = segments(torch.tensor([[7, 8, 1, 9, 1, 5], [1, 1, 4, 4, 4, 1]]), eos=1)
    assert found["segment_ids"].tolist() == [[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 2, 2]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]


def _corpus(folder, texts=TEXTS):
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text)
    return DataSpec(source=f"path:{folder}", length=16, tokenizer=BYTES)


def test_a_document_is_in_one_split_and_a_new_one_moves_no_other(tmp_path):
    spec = _corpus(tmp_path / "c")
    data = load_data(spec)
    train, held = (set(data.documents(s)) for s in ("train", "validation"))
    assert not train & held and train | held == set(TEXTS) and 0 < len(held) < len(train)
    (tmp_path / "c" / "zz.txt").write_text("One more document, which was not there before.")
    more = load_data(spec)
    assert train <= set(more.documents("train")) and held <= set(more.documents("validation"))
    assert more.fingerprint != data.fingerprint
    assert load_data(DataSpec(**{**vars(spec), "seed": 1})).documents("validation") != data.documents("validation")


def test_fingerprint_is_the_same_in_another_process(tmp_path):
    spec = _corpus(tmp_path / "c")
    code = f"from layerwise.data.load import *; from layerwise.data.spec import *; print(load_data(DataSpec(source={spec.source!r}, length=16, tokenizer=TokenizerSpec('bytes'))).fingerprint)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == load_data(spec).fingerprint
    )


def test_cache_spares_the_work_and_a_broken_entry_is_made_anew(tmp_path, monkeypatch):
    spec, cache = _corpus(tmp_path / "c"), tmp_path / "cache"
    first = load_data(spec, cache_dir=cache)
    real = loading.read_source
    monkeypatch.setattr(loading, "read_source", lambda *a: pytest.fail("read again"))
    second = load_data(spec, cache_dir=cache)
    assert second.fingerprint == first.fingerprint and second.vocab == first.vocab
    index = torch.arange(len(first.train))
    assert torch.equal(first.train.batch(index)["input_ids"], second.train.batch(index)["input_ids"])
    monkeypatch.setattr(loading, "read_source", real)
    (entry,) = (cache / "data").iterdir()
    file = entry / "train.rows.npy"
    file.write_bytes(file.read_bytes()[:-3])
    third = load_data(spec, cache_dir=cache)
    assert torch.equal(first.train.batch(index)["input_ids"], third.train.batch(index)["input_ids"])


def test_tables_columns_and_labels(tmp_path):
    rows = [{"body": f"text {i} " * 5, "label": ["no", "yes"][i % 2]} for i in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(r) for r in rows[:9]))
    data = load_data(DataSpec(source=f"path:{tmp_path}", columns={"text": "body"}, length=24, tokenizer=BYTES, examples=20))
    assert data.classes == 2 and len(data.train) == 20 and len(data.test) == 9
    batch = data.train.batch(torch.arange(20))
    assert batch["labels"].bincount().tolist() == [10, 10] and set(batch) == {"input_ids", "attention_mask", "labels"}
    assert (batch["input_ids"][:, 0] == data.cls_id).all()
    with pytest.raises(BadInput, match="has no column 'boby'; it has body, label"):
        load_data(DataSpec(source=f"path:{tmp_path}", columns={"text": "boby"}, tokenizer=BYTES))
    with pytest.raises(BadInput, match=r"neither a text nor an image column but body, label.*data\.columns"):
        load_data(DataSpec(source=f"path:{tmp_path}", tokenizer=BYTES))


def test_csv_and_single_long_text(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(f"line {i} of words" for i in range(50)))
    assert len(load_data(DataSpec(source=f"path:{tmp_path / 'a.csv'}", length=16, tokenizer=BYTES)).train) > 10
    (tmp_path / "b.txt").write_text("\n\n".join(f"Paragraph {i}. " + "words " * 100 for i in range(60)))
    data = load_data(DataSpec(source=f"path:{tmp_path / 'b.txt'}", length=16, tokenizer=BYTES))
    assert not set(data.documents("train")) & set(data.documents("validation"))


def test_image_folders_and_digits(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(8):
            Image.fromarray(np.random.default_rng(i + len(label)).integers(0, 255, (6, 6, 3), dtype=np.uint8)).save(
                tmp_path / label / f"{i}.png"
            )
    data = load_data(DataSpec(source=f"path:{tmp_path}", validation=0.25))
    assert data.kind == "images" and (data.channels, data.size, data.classes) == (3, (6, 6), 2)
    digits = load_data(DataSpec(source="builtin:digits"))
    batch = digits.train.batch(torch.arange(5))
    assert batch["pixel_values"].shape == (5, 1, 8, 8) and batch["pixel_values"].min() >= 0 and batch["pixel_values"].max() <= 1
    assert sum(len(s) for s in (digits.train, digits.validation, digits.test)) == 1797
    Image.new("RGB", (9, 9)).save(tmp_path / "cat" / "big.png")
    with pytest.raises(BadInput, match="different sizes"):
        load_data(DataSpec(source=f"path:{tmp_path}"))


def test_augmentation_keeps_shape_and_range_and_follows_the_seed():
    data = load_data(DataSpec(source="builtin:digits", augment=AugmentSpec(flip=True, crop=1, rotate=10, color=0.2)))
    batch = data.train.batch(torch.arange(16))
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(data.augment(batch)["pixel_values"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert made[0].shape == batch["pixel_values"].shape and 0 <= made[0].min() <= made[0].max() <= 1


def test_boundaries_reach_the_batch(tmp_path):
    spec = _corpus(tmp_path / "c")
    batch = load_data(DataSpec(**{**vars(spec), "boundaries": True, "length": 64})).train.batch(torch.arange(4))
    assert batch["segment_ids"].max() >= 1 and (batch["position_ids"] < 64).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin:dosc", "Did you mean 'docs'"),
        ("builtn:docs", "Did you mean 'builtin'"),
        ("path:", "names nothing"),
        ("path:/nowhere/at/all", "there is no file or folder"),
        ("mnist", "--data-dir"),
        ("../up", "not a set's name"),
    ],
)
def test_sources_that_are_not_there(source, message):
    with pytest.raises(BadInput, match=message):
        check_source(DataSpec(source=source))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a b\n\nc d")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 900)
    (tmp_path / "bad.jsonl").write_text("{not json")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "mnist").mkdir()
    for name, message in (
        ("a.doc", "kind layerwise does not read"),
        ("empty.txt", "is empty"),
        ("short.txt", r"document|one row needs 128"),
        ("latin.txt", "not UTF-8"),
        ("bad.jsonl", "cannot be read as json"),
    ):
        with pytest.raises(BadInput, match=message):
            load_data(DataSpec(source=f"path:{tmp_path / name}", tokenizer=BYTES))
    with pytest.raises(BadInput, match="Did you mean 'mnist'"):
        check_source(DataSpec(source="mnits"), tmp_path / "sets")
    with pytest.raises(BadInput, match="no data files"):
        check_source(DataSpec(source="mnist"), tmp_path / "sets")
    with pytest.raises(BadInput, match="no tokenizer file"):
        check_source(DataSpec(tokenizer=TokenizerSpec("file", path=str(tmp_path))))
    with pytest.raises(BadInput, match="network"):
        load_data(DataSpec(source="hub:nobody/nothing"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mnist", "images"), ("sst2", "text"), ("wikitext-2", "text"), ("tinyshakespeare", "text"), ("trec", "text"), ("cola", "text")],
)
def test_named_sets(data_dir, name, kind):
    if not (data_dir / name).is_dir():
        pytest.skip(f"{name} is not in the data folder")
    data = load_data(DataSpec(source=name, tokenizer=BYTES, examples=500 if kind == "images" else None), data_dir)
    assert data.kind == kind and len(data.train) > 100 and len(data.validation) > 10 and data.sources[0]["name"] == name
