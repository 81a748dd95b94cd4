"""The loss on answers alone."""

import pytest
import torch

import layerwise as lw
from layerwise.data.load import load_data
from layerwise.data.recall import questions
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.objectives.answers import Answers


@pytest.mark.parametrize("kind", ["key-values", "lines", "needle"])
def test_labels_are_the_answers(kind: str) -> None:
    """The tokens that count are those the texts' own questions name; the loss and the accuracy are those of a plain softmax there."""
    data = load_data(DataSpec(f"builtin:{kind}", length=180, documents=4, tokenizer=TokenizerSpec("bytes")))
    objective, rows = Answers(data), data.train.batch(torch.arange(4))
    labels = objective.labels(rows["input_ids"])
    for row, text in zip(labels, data.documents("train"), strict=True):
        wanted = [i for q in questions(text) for i in range(q.answer, q.end)]
        assert (row != -100).nonzero().squeeze(1).tolist() == wanted
    model = lw.load(
        "decoder", embedding={"vocab": 262}, stack={"depth": 1, "width": 16, "layer": {"causal": True, "heads": 2, "ffn_width": 16}}
    )
    loss = objective(model, rows)
    logits = model(rows).logits[:, :-1].float()
    there = labels[:, 1:] != -100
    assert int(loss.count) == int(there.sum())
    torch.testing.assert_close(loss.mean, torch.nn.functional.cross_entropy(logits[there], labels[:, 1:][there]))
    assert int(loss.metrics["accuracy"]) == int((logits.argmax(dim=-1) == labels[:, 1:])[there].sum())
