"""Masked tokens with a teacher beside, and a new head on an old stack."""

import pytest
import torch

import layerwise as lw
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.objectives.distill import DistilledMaskedLM
from layerwise.objectives.language import MaskedLM


def _model(vocab, seed=0):
    data = preset("bert")
    data["stack"] |= {"depth": 2, "width": 16}
    data["stack"]["layer"] |= {"heads": 2}
    data["embedding"] |= {"vocab": vocab}
    return build(model_spec(data), seed).eval()


def test_a_student_that_is_its_teacher_has_the_masked_loss_alone(text):
    model, batch = _model(text.vocab), text.train.batch(torch.arange(4))
    plain = MaskedLM(text)(model, batch, torch.Generator().manual_seed(0))
    ours = DistilledMaskedLM(text, teacher=model)(model, batch, torch.Generator().manual_seed(0))
    assert ours.metrics["distance"] == 0 and ours.total == plain.total and ours.count == plain.count


def test_the_distance_is_the_mean_over_layers_of_the_mean_square(text):
    model, teacher = _model(text.vocab), _model(text.vocab, seed=1)
    batch, objective = text.train.batch(torch.arange(4)), DistilledMaskedLM(text, teacher=teacher, weight=3.0)
    ours = objective(model, batch, torch.Generator().manual_seed(0))
    plain = MaskedLM(text)(model, batch, torch.Generator().manual_seed(0))
    distance = ours.metrics["distance"] / ours.count
    assert distance > 0
    torch.testing.assert_close(ours.total - plain.total, 3.0 * distance * ours.count, rtol=1e-4, atol=1e-3)


def test_the_embedding_counts_among_the_hidden_states(text):
    model, teacher = _model(text.vocab), _model(text.vocab, seed=1)
    batch, objective = text.train.batch(torch.arange(4)), DistilledMaskedLM(text, teacher=teacher)
    made = objective(model, batch, torch.Generator().manual_seed(0))
    masked, _ = objective.task.masked(batch, torch.Generator().manual_seed(0))
    places = torch.arange(masked["input_ids"].shape[1])[None]
    states = [[m.embedding(masked, places), *m(masked, hiddens=True).hiddens] for m in (model, teacher)]
    expected = sum(torch.nn.functional.mse_loss(a, b) for a, b in zip(*states, strict=True)) / 3
    torch.testing.assert_close(torch.as_tensor(made.metrics["distance"] / made.count), expected.detach())


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_a_classifier_on_the_same_stack(text, pool):
    model = _model(text.vocab)
    made = lw.edit.classifier_head(model, classes=3, pool=pool, seed=1)
    ids = text.train.batch(torch.arange(2))
    out = made(ids)
    assert out.logits.shape == (2, 3) and torch.equal(out.hidden, model(ids).hidden)
    torch.testing.assert_close(out.logits, out.pooled @ made.head.out.weight.T + made.head.out.bias)
