"""What two models are compared or joined by: agreement of embeddings, votes of classifiers."""

import pytest
import torch
from scipy import stats

from layerwise.evaluate.agreement import embedding_agreement
from layerwise.evaluate.ensemble import ensemble_accuracy
from layerwise.models.checkpoint import save
from layerwise.models.model import build
from layerwise.models.spec import model_spec
from layerwise.optim.spec import OptimizerSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec


def test_agreement_is_cosine_of_pooled_vectors_and_rank_of_similarities(text, tmp_path):
    one, two = (build(model_spec({"embedding": {"vocab": text.vocab}, "stack": {"depth": 1, "width": 16}}), s).eval() for s in (0, 1))
    itself = embedding_agreement(one, text, other=str(save(one, tmp_path / "one"))).metrics
    assert itself == pytest.approx({"cosine": 1.0, "rank_agreement": 1.0})
    found = embedding_agreement(one, text, other=str(save(two, tmp_path / "two")), batch=3, batches_at_most=None).metrics
    rows = text.validation.batch(torch.arange(len(text.validation)))
    with torch.no_grad():
        a, b = (torch.nn.functional.normalize(m(rows).pooled, dim=1) for m in (one, two))
    assert found["cosine"] == pytest.approx(float((a * b).sum(1).mean()), abs=1e-6)
    pairs = [(i, j) for i in range(len(a)) for j in range(i + 1, len(a))]
    left, right = ([float(m[i] @ m[j]) for i, j in pairs] for m in (a, b))
    assert found["rank_agreement"] == pytest.approx(stats.spearmanr(left, right).statistic, abs=1e-6)


def test_an_ensemble_votes_by_the_mean_of_probabilities(digits, tmp_path):
    spec = {"embedding": {"kind": "pixels", "channels": 1, "size": [8, 8], "flatten": True}, "head": {"kind": "classifier", "classes": 10}}
    spec["stack"] = {"layers": [{"kind": "dense", "channels": 16, "norm": "none", "bias": True}], "inputs": 64}
    one, two = (build(model_spec(spec), s) for s in (0, 1))
    for model in (one, two):
        train(model, digits, TrainSpec("classification", steps=15, batch=16, optimizer=OptimizerSpec(lr=5e-3)))
    found = ensemble_accuracy(one, digits, other=str(save(two, tmp_path / "two")), batch=50).metrics
    rows = digits.validation.batch(torch.arange(len(digits.validation)))
    with torch.no_grad():
        a, b = (m.eval()(rows).logits.softmax(1) for m in (one, two))
    for name, scores in (("accuracy", a + b), ("accuracy_here", a), ("accuracy_there", b)):
        assert found[name] == pytest.approx((scores.argmax(1) == rows["labels"]).double().mean().item())
