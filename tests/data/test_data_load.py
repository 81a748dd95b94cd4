"""Loading: splits by content, the cache, files of every kind, and the word for what cannot be read."""

import csv
import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import layerwise.data.load as loading
from layerwise.data.load import check_source, load_data
from layerwise.data.raw import Raw, Rows, positions
from layerwise.data.sources import read_source
from layerwise.data.spec import AugmentSpec, DataSpec, TokenizerSpec
from layerwise.data.tokenizer import make_tokenizer
from layerwise.errors import BadInput

BYTES = TokenizerSpec("bytes")
TEXTS = [f"Document number {i}: " + "something to say. " * (i % 5 + 3) for i in range(30)]
NAMES = ["ant", "bee", "cat"]


def _folder(folder, files):
    """A folder of files from their names and contents."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def _texts(folder, texts=TEXTS):
    return _folder(folder, {f"{i:03d}.txt": text for i, text in enumerate(texts)})


def _spec(path, **more):
    return DataSpec(**{"source": f"path:{path}", "length": 16, "tokenizer": BYTES, **more})


def _jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def _csv(rows, **options):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _parquet(rows):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def _png(value, size=(6, 5), mode="L", kind="png"):
    out = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(out, kind)
    return out.getvalue()


# Splits


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=3), min_size=2, max_size=30),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 50),
    extra=st.text("xyz", min_size=1, max_size=4),
)
def test_no_document_is_in_two_splits_and_a_new_one_moves_no_other(texts, share, seed, extra):
    spec = DataSpec(validation=share, seed=seed)

    def split(documents):
        made = loading._split(Raw("text", "t", {"train": Rows(texts=documents)}), spec)
        return [made[s].texts for s in ("train", "validation")]

    train, held = split(texts)
    assert sorted(train + held) == sorted(texts) and train and held
    if len(set(texts)) > 1:
        assert not set(train) & set(held)
    place = positions([t.encode() for t in texts], seed)
    if (place < share).any() and not (place < share).all():
        more_train, more_held = split([extra, *texts])
        assert [t for t in more_train if t != extra] == train and [t for t in more_held if t != extra] == held


def test_the_share_held_out_is_about_what_was_asked_for():
    keys = [f"{i}".encode() for i in range(5000)]
    place = positions(keys, 3)
    assert place.min() >= 0 and place.max() < 1
    assert (place < 0.1).mean() == pytest.approx(0.1, abs=5 * (0.09 / 5000) ** 0.5)
    assert np.corrcoef(place, positions(keys, 4))[0, 1] == pytest.approx(0, abs=0.07)


def test_documents_limits_the_training_documents_and_one_document_is_too_few(tmp_path):
    few = load_data(_spec(_texts(tmp_path / "a"), documents=10))
    assert len(few.documents("train")) + len(few.documents("validation")) == 10
    more = load_data(_spec(tmp_path / "a", documents=20))
    assert set(few.documents("validation")) <= set(more.documents("validation")), "a larger choice holds the smaller one"
    with pytest.raises(BadInput, match=r"has 1 document.*splits are by document"):
        load_data(_spec(_folder(tmp_path / "b", {"a.txt": "one document"}) / "a.txt"))


# Fingerprint and cache


def test_the_fingerprint_is_stable_across_processes_and_follows_the_content(tmp_path):
    folder = _texts(tmp_path / "a")
    spec = _spec(folder, tokenizer=TokenizerSpec("wordpiece", vocab=300))
    data = load_data(spec)
    code = (
        "from layerwise.data.load import load_data; from layerwise.data.spec import DataSpec, TokenizerSpec;"
        f"d = load_data({spec!r}); print(d.fingerprint, d.sources[0]['sha256'], int(d.train.arrays['rows'].sum()))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert there == [data.fingerprint, data.sources[0]["sha256"], str(int(data.train.arrays["rows"].sum()))]
    assert load_data(dataclasses.replace(spec, length=17)).fingerprint != data.fingerprint
    (folder / "000.txt").write_text(TEXTS[0].replace("0", "O"))
    assert load_data(spec).fingerprint != data.fingerprint


def test_the_fingerprint_follows_the_content_of_a_tokenizer_file(tmp_path):
    spec = _spec(_texts(tmp_path / "a"), tokenizer=TokenizerSpec("file", path=str(tmp_path)))
    seen = set()
    for vocab in (300, 320):
        make_tokenizer(TokenizerSpec("bpe", vocab=vocab), TEXTS).save(str(tmp_path / "tokenizer.json"))
        data = load_data(spec, cache_dir=tmp_path / "cache")
        assert load_data(spec, cache_dir=tmp_path / "cache").fingerprint == data.fingerprint == load_data(spec).fingerprint
        seen.add(data.fingerprint)
    assert len(seen) == 2


def test_labels_are_part_of_the_content(tmp_path):
    rows = [{"text": f"text number {i}", "label": i % 2} for i in range(30)]
    found = []
    for flip in (0, 1):
        _folder(tmp_path / "a", {"train.jsonl": _jsonl([{**r, "label": r["label"] ^ flip} for r in rows])})
        found.append(load_data(_spec(tmp_path / "a")).sources[0]["sha256"])
    assert found[0] != found[1]


def _same(a, b):
    return all(np.array_equal(a.arrays[n], b.arrays[n]) for n in a.arrays | b.arrays) and a.boundaries == b.boundaries


@pytest.mark.parametrize("tokenizer", [BYTES, TokenizerSpec("bpe", vocab=300)])
def test_a_second_load_reads_the_cache_and_nothing_else(tmp_path, monkeypatch, tokenizer):
    spec, cache = _spec(_texts(tmp_path / "a"), tokenizer=tokenizer, boundaries=True), tmp_path / "cache"
    first = load_data(spec, cache_dir=cache)
    with monkeypatch.context() as forbidden:
        for name in ("make_tokenizer", "read_source", "read_tokenizer", "encoded", "packed"):
            forbidden.setattr(loading, name, lambda *a, name=name: pytest.fail(f"{name} was called"))
        second = load_data(spec, cache_dir=cache)
        assert (second.fingerprint, second.vocab, second.eos_id, second.sources) == (
            first.fingerprint,
            first.vocab,
            first.eos_id,
            first.sources,
        )
        assert _same(first.train, second.train) and _same(first.validation, second.validation)
        assert second.tokenizer.to_str() == first.tokenizer.to_str()
    (tmp_path / "a" / "new.txt").write_text("Another document, of a few words at least.")
    assert load_data(spec, cache_dir=cache).fingerprint != first.fingerprint, "a changed source is read again"


def _entry(cache):
    (entry,) = list((cache / "data").iterdir())
    return entry


DAMAGE = {
    "cut": lambda e: (e / "train.rows.npy").write_bytes((e / "train.rows.npy").read_bytes()[:-5]),
    "flip": lambda e: (e / "train.rows.npy").write_bytes((e / "train.rows.npy").read_bytes()[:-1] + b"\xff"),
    "empty": lambda e: (e / "validation.rows.npy").write_bytes(b""),
    "gone": lambda e: (e / "validation.rows.npy").unlink(),
    "meta": lambda e: (e / "meta.json").write_text("{"),
    "checksums gone": lambda e: (e / "checksums.json").unlink(),
    "checksums of nothing": lambda e: [(e / "checksums.json").write_text("{}"), (e / "meta.json").write_text("[]")],
    "checksums of another shape": lambda e: (e / "checksums.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_entry_is_made_anew(tmp_path, damage):
    spec, cache = _spec(_texts(tmp_path / "a")), tmp_path / "cache"
    first = load_data(spec, cache_dir=cache)
    DAMAGE[damage](_entry(cache))
    again = load_data(spec, cache_dir=cache)
    assert _same(first.train, again.train) and _same(first.validation, again.validation)
    assert _same(load_data(spec, cache_dir=cache).train, first.train)
    assert not [p for p in (cache / "data").iterdir() if p.name.startswith(".")]


# Files


ROWS = [{"text": f"The {NAMES[i % 3]} walked, \"quickly\",\tover {i} hills and {i * i} stones." + "\nOn." * (i % 2), "label": i % 3} for i in range(30)]  # fmt: skip
WRITERS = {
    "jsonl": _jsonl,
    "csv": _csv,
    "tsv": lambda rows: _csv(rows, dialect="excel-tab"),
    "parquet": _parquet,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_tables_of_every_kind_hold_the_same(tmp_path, suffix):
    files = {
        f"{split}.{suffix}": WRITERS[suffix](rows) for split, rows in {"train": ROWS, "validation": ROWS[:6], "test": ROWS[6:9]}.items()
    }
    raw = read_source(_spec(_folder(tmp_path / "a", files)))
    assert {s: rows.texts for s, rows in raw.splits.items()} == {
        "train": [r["text"] for r in ROWS],
        "validation": [r["text"] for r in ROWS[:6]],
        "test": [r["text"] for r in ROWS[6:9]],
    }
    assert raw.splits["train"].labels.tolist() == [r["label"] for r in ROWS]
    data = load_data(_spec(tmp_path / "a"))
    assert (len(data.train), len(data.validation), len(data.test), data.classes) == (30, 6, 3, 3)
    assert read_source(_spec(tmp_path / "a" / f"train.{suffix}")).splits["train"].texts == raw.splits["train"].texts


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("validation", "validation"),
        ("valid", "validation"),
        ("val", "validation"),
        ("dev", "validation"),
        ("dev-00000-of-00001", "validation"),
        ("my_test", "test"),
        ("test-00000-of-00002", "test"),
        ("Test", "test"),
        ("values", "train"),
        ("valley", "train"),
        ("developers", "train"),
        ("testimony", "train"),
        ("contest", "train"),
        ("2024", "train"),
    ],
)
def test_a_file_s_name_says_its_split(tmp_path, name, split):
    files = {f"{name}.jsonl": _jsonl(ROWS[:4]), "one.jsonl": _jsonl(ROWS[4:])}
    raw = read_source(_spec(_folder(tmp_path / "a", files)))
    assert len(raw.splits[split]) == (30 if split == "train" else 4)


def test_columns_are_renamed_and_named_where_they_are_missing(tmp_path):
    rows = [{"body": r["text"], "class": NAMES[r["label"]], "label": 7} for r in ROWS]
    folder = _folder(tmp_path / "a", {"train.parquet": _parquet(rows)})
    data = load_data(_spec(folder, columns={"text": "body", "label": "class"}))
    assert data.classes == 3 and data.kind == "text"
    with pytest.raises(BadInput, match="data.columns.label: .* has no column 'klass'; it has body, class, label"):
        load_data(_spec(folder, columns={"text": "body", "label": "klass"}))
    with pytest.raises(BadInput, match="neither a text nor an image nor an audio column but body, class, label"):
        load_data(_spec(folder))


def test_a_class_name_has_one_number_in_all_splits(tmp_path):
    named = [{**r, "label": NAMES[r["label"]]} for r in ROWS]
    files = {"train.jsonl": _jsonl(named), "test.jsonl": _jsonl([r for r in named if r["label"] != "ant"])}
    raw = read_source(_spec(_folder(tmp_path / "a", files)))
    for rows in raw.splits.values():
        assert all(NAMES[label] in text for text, label in zip(rows.texts, rows.labels.tolist(), strict=True))


@pytest.mark.parametrize(("label", "found"), [(-1, "-1"), (0.5, "0.5"), (True, "False"), (None, "None")])
def test_labels_that_are_no_classes_are_shown(tmp_path, label, found):
    rows = [{"text": r["text"], "label": None if label is None else type(label)(0)} for r in ROWS]
    rows[5]["label"] = label
    if label is None:
        rows[0]["label"] = 1
    with pytest.raises(BadInput, match=f"class numbers from 0 on or class names; found {found if label != 0.5 else ''}"):
        read_source(_spec(_folder(tmp_path / "a", {"train.parquet": _parquet(rows)})))


def test_examples_are_stratified_and_a_larger_choice_holds_the_smaller(tmp_path):
    rows = [{"text": f"text {i} of its class", "label": 0 if i < 40 else 1 if i < 55 else 2} for i in range(60)]
    folder = _folder(tmp_path / "a", {"train.jsonl": _jsonl(rows), "validation.jsonl": _jsonl(rows[:3])})
    for examples, counts in ((6, [2, 2, 2]), (15, [5, 5, 5]), (21, [8, 8, 5]), (60, [40, 15, 5])):
        made = load_data(_spec(folder, examples=examples))
        assert np.bincount(made.train.arrays["labels"]).tolist() == counts and len(made.validation) == 3
    small, large = ({r.tobytes() for r in load_data(_spec(folder, examples=n)).train.arrays["rows"]} for n in (9, 12))
    assert small < large
    other = {r.tobytes() for r in load_data(_spec(folder, examples=9, seed=1)).train.arrays["rows"]}
    assert other != small
    with pytest.raises(BadInput, match="asks for 61 training examples; there are 60"):
        load_data(_spec(folder, examples=61))


def test_text_files_named_for_their_splits_and_one_long_text(tmp_path):
    long = "\n\n".join(f"Paragraph {i}: " + "word " * 100 for i in range(40))
    files = {"train.txt": long, "valid.txt": "Held out. " * 20, "test.txt": "For the end. " * 20}
    data = load_data(_spec(_folder(tmp_path / "a", files)))
    assert data.documents("validation") == [files["valid.txt"]] and data.documents("test") == [files["test.txt"]]
    assert "\n\n".join(data.documents("train")) == long and len(data.documents("train")) > 4
    with pytest.raises(BadInput, match="UTF-8"):
        load_data(_spec(_folder(tmp_path / "b", {"a.txt": b"caf\xe9"})))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_image_folders(tmp_path, mode):
    files = {f"{name}/{i}.png": _png(10 * k + i, mode=mode) for k, name in enumerate(NAMES) for i in range(4)}
    data = load_data(_spec(_folder(tmp_path / "a", files), validation=0.3))
    channels = 1 if mode in "L1" else 3
    assert (data.kind, data.channels, data.size, data.classes) == ("images", channels, (5, 6), 3)
    assert len(data.train) + len(data.validation) == 12
    raw = read_source(_spec(tmp_path / "a"))
    for image, label in zip(raw.splits["train"].images, raw.splits["train"].labels.tolist(), strict=True):
        same = [
            np.asarray(Image.open(tmp_path / "a" / NAMES[label] / f"{i}.png").convert("L" if channels == 1 else "RGB")) for i in range(4)
        ]
        assert any(np.array_equal(image[0], s if channels == 1 else s[..., 0]) for s in same), "every image has its folder's label"


def test_image_folders_below_splits_and_image_tables(tmp_path):
    files = {f"{s}/{n}/{i}.png": _png(i + k) for k, s in ((0, "train"), (50, "test")) for n in NAMES for i in range(4)}
    data = load_data(_spec(_folder(tmp_path / "a", files)))
    assert len(data.test) == 12 and len(data.train) + len(data.validation) == 12 and data.classes == 3
    rows = [{"picture": {"bytes": _png(i), "path": None}, "label": i % 2} for i in range(12)]
    data = load_data(_spec(_folder(tmp_path / "b", {"train.parquet": _parquet(rows)}), columns={"image": "picture"}))
    assert (data.kind, data.size, data.classes) == ("images", (5, 6), 2)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ({"bytes": b"GIF89a nothing", "path": None}, "image 3 cannot be decoded"),
        ({"bytes": None, "path": "/nowhere/a.png"}, "image 3 cannot be decoded"),
        ({"bytes": None, "path": None}, "image 3 cannot be decoded"),
        (None, "image 3 cannot be decoded"),
        ({"bytes": _png(1, size=(9, 9)), "path": None}, "different sizes"),
    ],
)
def test_images_that_cannot_be_used_are_numbered(tmp_path, picture, message):
    rows = [{"image": {"bytes": _png(i), "path": None}, "label": i % 2} for i in range(6)]
    rows[3]["image"] = picture
    with pytest.raises(BadInput, match=message):
        load_data(_spec(_folder(tmp_path / "a", {"train.parquet": _parquet(rows)})))


def test_builtin_digits_are_scikit_learn_s(digits):
    from sklearn.datasets import load_digits

    whole = load_data(DataSpec(source="builtin:digits"))
    assert len(whole.train) + len(whole.validation) + len(whole.test) == 1797
    assert (whole.channels, whole.size, whole.classes) == (1, (8, 8), 10)
    seen = np.concatenate([s.arrays["images"] for s in (whole.train, whole.validation, whole.test)])
    assert sorted(i.tobytes() for i in seen) == sorted(np.round(i / 16 * 255).astype(np.uint8).tobytes() for i in load_digits().images)
    assert np.bincount(digits.train.arrays["labels"]).tolist() == [40] * 10
    pixels = whole.train.batch(torch.arange(64))["pixel_values"]
    assert pixels.dtype == torch.float32 and pixels.min() == 0 and pixels.max() == 1


# Augmentation


@pytest.mark.parametrize(
    "spec",
    [AugmentSpec(flip=True), AugmentSpec(crop=2), AugmentSpec(rotate=15), AugmentSpec(color=0.3), AugmentSpec(True, 2, 15, 0.3)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_keeps_shape_and_range_and_follows_the_seed(spec, channels):
    from layerwise.data.augment import make_augment

    change = make_augment(spec, (8, 6))
    pixels = torch.rand(16, channels, 8, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16)
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(change({"pixel_values": pixels.clone(), "labels": labels}))
    assert made[0]["labels"] is labels
    a, b, c = (m["pixel_values"] for m in made)
    assert a.shape == pixels.shape and a.dtype == pixels.dtype and a.min() >= 0 and a.max() <= 1
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, pixels)
    if spec == AugmentSpec(flip=True):
        assert all(torch.equal(x, y) or torch.equal(x, y.flip(-1)) for x, y in zip(a, pixels, strict=True))


def test_no_augmentation_unless_asked_for(digits):
    assert digits.augment is None


# What cannot be read


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("builtin:", "names nothing after 'builtin:'"),
        ("path:", "names nothing after 'path:'"),
        ("hub:", "names nothing after 'hub:'"),
        ("builtin:digit", "unknown built-in corpus 'digit'. Did you mean 'digits'"),
        ("pth:a", "'pth' is not a kind of source. Did you mean 'path'.*Known: builtin:, path:, hub:"),
        ("a/b", "is not a set's name; for files write path:a/b"),
        ("..", "is not a set's name"),
        ("", "is not a set's name"),
        ("mnist", r"say where it lies with --data-dir \(it looks for DIR/mnist/\)"),
        ("path:/nowhere/a.txt", "there is no file or folder /nowhere/a.txt"),
    ],
)
def test_sources_without_files(source, message):
    for reading in (check_source, read_source, load_data):
        with pytest.raises(BadInput, match=message):
            reading(DataSpec(source=source))


@pytest.mark.parametrize(
    ("files", "at", "message"),
    [
        ({"a.pdf": "x"}, "a.pdf", "a.pdf is of a kind layerwise does not read; it reads .csv, .json"),
        ({"a.pdf": "x"}, "", "no data files in"),
        ({".hidden.txt": "x"}, "", "no data files in"),
        ({"a.txt": "", "b.txt": ""}, "", "is empty"),
        ({"a.txt": " \n\n "}, "", "empty|no training split"),
        ({"train.jsonl": '{"text": '}, "", "cannot be read as json"),
        ({"train.parquet": "not parquet"}, "", "cannot be read as parquet"),
        ({"test.jsonl": _jsonl(ROWS)}, "", "has no training split; it has test"),
        ({"train.csv": "text\n", "test.csv": "text\nb\n"}, "", "is empty|cannot be read as csv"),
        ({"a/1.png": b"no image", "b/1.png": _png(1), "b/2.png": _png(2)}, "", "cannot be decoded"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, files, at, message):
    with pytest.raises(BadInput, match=message):
        load_data(_spec(_folder(tmp_path / "a", files) / at))


def test_too_little_text_says_how_much_is_missing(tmp_path):
    with pytest.raises(BadInput, match=r"its \w+ split has \d+ tokens in \d+ documents, but one row needs 512.*smaller data\.length"):
        load_data(_spec(_texts(tmp_path / "a", TEXTS[:2]), length=512))


def test_named_sets_that_are_missing_or_empty(tmp_path):
    (tmp_path / "sets" / "wikitext-2").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"there is no set 'wikitext2' in .*Did you mean 'wikitext-2'\? Put its files"):
        check_source(DataSpec(source="wikitext2"), tmp_path / "sets")
    with pytest.raises(BadInput, match="there is no set 'a' in"):
        check_source(DataSpec(source="a"), tmp_path / "nowhere")
    with pytest.raises(BadInput, match="no data files"):
        check_source(DataSpec(source="wikitext-2"), tmp_path / "sets")
    with pytest.raises(BadInput, match="there is no tokenizer file"):
        check_source(DataSpec(tokenizer=TokenizerSpec("file", path=str(tmp_path / "t.json"))))


@pytest.mark.parametrize(
    "fields",
    [{"length": 1}, {"validation": 0.0}, {"validation": 1.0}, {"documents": 1}, {"examples": 0}],
)
def test_descriptions_that_make_no_sense(fields):
    with pytest.raises(BadInput, match=next(iter(fields))):
        DataSpec(**fields)
    with pytest.raises(BadInput):
        AugmentSpec(crop=-1)


# Public sets


@pytest.mark.parametrize(
    ("name", "kind", "facts"),
    [
        ("mnist", "images", {"classes": 10, "channels": 1, "size": (28, 28)}),
        ("sst2", "text", {"classes": 2}),
        ("wikitext-2", "text", {"classes": None}),
        ("tinyshakespeare", "text", {"classes": None}),
    ],
)
def test_public_sets(data_dir, tmp_path, name, kind, facts):
    if not (data_dir / name).is_dir():
        pytest.skip(f"{name} is not in the data folder")
    spec = DataSpec(source=name, tokenizer=BYTES, length=64, examples=100 if kind == "images" or facts["classes"] else None)
    data = load_data(spec, data_dir, tmp_path)
    assert data.kind == kind and {n: getattr(data, n) for n in facts} == facts and data.sources[0]["name"] == name
    assert _same(load_data(spec, data_dir, tmp_path).train, data.train)
    if facts["classes"]:
        assert len(data.train) == 100 and data.test is not None
        assert np.bincount(data.train.arrays["labels"]).tolist() == [100 // facts["classes"]] * facts["classes"]
    else:
        first = data.tokenizer.decode(data.train.batch(torch.arange(1))["input_ids"][0].tolist())
        assert data.documents("train")[0].startswith(first)
        assert not set(data.documents("train")) & set(data.documents("validation"))


def test_shares_deal_the_rows_of_classes_out_by_content():
    whole = load_data(DataSpec(source="builtin:digits", examples=600))
    parts = [
        load_data(DataSpec(source="builtin:digits", examples=600, shares=shares))
        for shares in ({"9": (0, 1), "*": (0, 0.1)}, {"9": (0, 0), "*": (0.1, 1)})
    ]
    counts = [np.bincount(part.train.arrays["labels"], minlength=10) for part in (whole, *parts)]
    assert (counts[1] + counts[2] == counts[0]).all() and counts[2][9] == 0 and counts[1][9] == counts[0][9]
    assert 20 < counts[1][:9].sum() < 90
    rows = [{image.tobytes() for image in part.train.arrays["images"]} for part in parts]
    assert not rows[0] & rows[1]
    assert all(part.classes == 10 and len(part.validation) == len(whole.validation) for part in parts)
    with pytest.raises(BadInput, match=r"a part \[low, high\] of \[0, 1\]"):
        DataSpec(shares={"9": (0.5, 0.1)})
    with pytest.raises(BadInput, match=r"data\.shares chooses rows by their labels"):
        load_data(DataSpec(source="builtin:docs", shares={"*": (0, 1)}))
