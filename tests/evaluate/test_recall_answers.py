"""How many questions are answered: against generation, and with models that answer all or none."""

import random
import types
from typing import Any

import pytest
import torch

import layerwise as lw
from layerwise.data.load import load_data
from layerwise.data.recall import questions
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.errors import BadInput
from layerwise.evaluate.recall import _texts
from layerwise.evaluate.recall import recall as measure

LAYER = {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 2, "ffn_width": 32}


@pytest.fixture(scope="module")
def data() -> Any:
    return load_data(DataSpec("builtin:key-values", length=80, documents=4, tokenizer=TokenizerSpec("bytes")))


def _model(**more: Any) -> Any:
    return lw.load(
        "decoder",
        embedding={"vocab": 262, "std": 1.0},
        head={"bias": True},
        stack={"depth": 2, "width": 16, "init_std": 0.3, "layer": {**LAYER, **more}},
    ).eval()


def _few(data: Any, texts: int = 6) -> Any:
    """The same data with a few texts to be asked about."""
    return types.SimpleNamespace(
        validation=data.validation, tokenizer=data.tokenizer, spec=data.spec, documents=lambda split: data.documents(split)[:texts]
    )


def test_every_token_is_where_it_belongs(data: Any) -> None:
    for text, raw in zip(_texts(_few(data), "validation"), data.documents("validation")[:6], strict=True):
        found = questions(raw)
        assert data.tokenizer.decode(text.context) == raw[: found[0].begin]
        for (first, begin, end), q, distance in zip(text.spans, found, text.distances, strict=True):
            assert data.tokenizer.decode(text.asked[first:begin]) == raw[q.begin : q.answer]
            assert data.tokenizer.decode(text.asked[begin:end]) == raw[q.answer : q.end]
            assert distance == q.answer - q.said


@pytest.mark.parametrize(
    "cache", [None, {"window": 8, "bits": 4}, {"kind": "recent", "window": 30}, {"kind": "heavy", "window": 8, "heavy": 12}], ids=str
)
def test_reading_says_what_generation_writes(data: Any, cache: dict[str, Any] | None) -> None:
    """Texts with one question, whose past is the same in both: as many answers are right."""
    model = _model()
    with torch.no_grad():  # a model that says nothing but digits is right now and then
        model.head.bias.fill_(-1e4)
        model.head.bias[[6 + ord(c) for c in "0123456789"]] = 0.0
    if cache is not None and "bits" in cache:
        model = lw.edit.shrink_cache(model, density=0.5, start="svd", **cache)
    elif cache is not None:
        model = lw.edit.evict_cache(model, **cache)
    draw = random.Random(0)
    texts = []
    for _ in range(60):
        said = [f"{key}{draw.randrange(10)} " for key in "abcdefghijklmnop"]
        texts.append("".join(said) + "?" + draw.choice(said))
    one = types.SimpleNamespace(validation=data.validation, tokenizer=data.tokenizer, spec=data.spec, documents=lambda split: texts)
    read, written = (measure(model, one, by=by, batch=16).metrics["recall_accuracy"] for by in ("reading", "generation"))
    assert 0 < read < 0.5
    assert read == written


def test_shares_of_a_whole_cache(data: Any) -> None:
    model = _model()
    whole = measure(model, _few(data)).metrics
    assert whole["cache_share"] == pytest.approx(1.0)
    few = lw.edit.evict_cache(model, kind="recent", window=16, sinks=4)
    assert measure(few, _few(data)).metrics["cache_share"] == pytest.approx(
        20 * whole["cache_share"] * 2 * 2 * 16 * 4 / whole["cache_bytes"]
    )


def test_far_answers_alone(data: Any) -> None:
    with pytest.raises(BadInput, match="furthest"):
        measure(_model(), _few(data), beyond=1000)
    assert "recall_accuracy" in measure(_model(), _few(data), beyond=20).metrics


def test_texts_without_questions_are_refused() -> None:
    plain = types.SimpleNamespace(validation=[1], spec=DataSpec("builtin:code"), documents=lambda split: ["a text"], tokenizer=None)
    with pytest.raises(BadInput, match="holds none"):
        measure(_model(), plain)
