"""Made-up texts with questions: what is asked was said, answers are where they are said to be, and splits share nothing."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from layerwise.data import builtin
from layerwise.data.load import load_data
from layerwise.data.recall import questions
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.errors import BadInput


def _data(kind: str, **options: Any) -> Any:
    return load_data(
        DataSpec(**{"source": f"builtin:{kind}", "length": 200, "documents": 8, "tokenizer": TokenizerSpec("bytes"), **options})
    )


@pytest.mark.parametrize("kind", ["key-values", "lines", "needle"])
def test_every_question_repeats_what_was_said(kind: str) -> None:
    data = _data(kind)
    for text in data.documents("train"):
        found = questions(text)
        assert len(found) == 1 if kind == "needle" else len(found) > 3
        first = found[0].begin
        for q in found:
            assert text[q.begin] == "?"
            number = text[q.answer : q.end]
            assert number.isdigit()
            assert text[q.said : q.said + len(number)] == number
            assert q.said + len(number) <= first
            assert not text[q.end].isdigit()
            statement = text[q.begin + 1 : q.end]
            assert text[:first].count(statement) == 1


def test_a_text_is_a_row_of_bytes() -> None:
    data = _data("key-values")
    assert data.train.arrays["rows"].shape == (8, 200)
    row = data.train.arrays["rows"][3]
    assert bytes((row[:-1] - 6).astype("uint8")).decode() == data.documents("train")[3]
    assert row[-1] == data.eos_id


@pytest.mark.parametrize("kind", ["key-values", "lines", "needle"])
def test_the_seed_decides(kind: str) -> None:
    first, again, other = (_data(kind, seed=seed).documents("validation") for seed in (0, 0, 1))
    assert first == again
    assert not set(first) & set(other)
    assert not set(first) & {*_data(kind).documents("train"), *_data(kind).documents("test")}


@pytest.mark.parametrize("length, count", [(55, 2), (200, 7), (748, 27)])
def test_every_line_is_asked_for_once_and_neither_letter_alone_names_it(length: int, count: int) -> None:
    for text in _data("lines", length=length).documents("train"):
        keys = [text[q.begin + 6 : q.begin + 8] for q in questions(text)]
        assert len(set(keys)) == len(keys) == count
        assert text.split("?")[0].count("line ") == count
        for letter in range(2):
            alike = {key[letter] for key in keys}
            assert len(alike) <= math.ceil(math.sqrt(2 * count)) < 26


def test_prepared_texts_are_made_anew_when_their_maker_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = tmp_path / "maker.py"
    maker.write_text("said = 'line bd is 317'")
    monkeypatch.setattr(builtin, "MAKERS", (maker,))
    before = builtin.identity()
    maker.write_text("said = 'line bd: 317'")
    assert builtin.identity() != before


def test_numbers_are_even() -> None:
    """No answer can be guessed better than by chance: all numbers are about as frequent."""
    texts = _data("key-values", documents=400).documents("train")
    numbers = [text[q.answer : q.end] for text in texts for q in questions(text)]
    assert len(set(numbers)) == 10
    assert max(map(numbers.count, set(numbers))) < 1.2 * len(numbers) / 10


def test_too_short_rows_are_refused() -> None:
    with pytest.raises(BadInput, match="at least 160"):
        _data("needle", length=100)
    assert dataclasses.replace(DataSpec(), source="builtin:lines").source == "builtin:lines"


def test_texts_without_questions_have_none() -> None:
    assert questions("What now? 12 of them.") == []
    assert questions("a12 b13 ?c14 ") == []


def test_long_texts_ask_for_all_keys_across_blanks() -> None:
    """With more room than 83 keys need, what is left lies between statements and questions, so that answers are further back."""
    data = _data("key-values", length=1024)
    for text in data.documents("train"):
        found = questions(text)
        assert len(text) == 1023 and len(found) == 83
        assert len({text[q.begin + 1] for q in found}) == 83
        assert text[3 * 83 : found[0].begin].strip() == "" and found[0].begin == 1023 - 4 * 83
        assert min(q.answer - q.said for q in found) > 1023 - 9 * 83
