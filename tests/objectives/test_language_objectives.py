"""Language objectives against full logits and hand-made labels."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.evaluate.language import language_modeling
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import HeadSpec, ModelSpec, model_spec
from layerwise.objectives.classification import Classification
from layerwise.objectives.language import CausalLM, MaskedLM
from layerwise.stack.spec import LayerSpec, StackSpec


def _decoder(vocab=262, **head):
    stack = StackSpec(depth=2, width=16, layer=LayerSpec(heads=2, causal=True, position="rotary"))
    return build(ModelSpec(TokenSpec(vocab=vocab), stack, HeadSpec(**head))).double()


def _encoder(vocab=262):
    data = preset("bert")
    data["stack"] |= {"depth": 2, "width": 16}
    data["stack"]["layer"] |= {"heads": 2}
    data["embedding"]["vocab"] = vocab
    return build(model_spec(data)).double()


@pytest.mark.parametrize("tie", [True, False])
def test_causal_lm_is_next_token_cross_entropy(text, tie):
    model, batch = _decoder(tie=tie), text.train.batch(torch.arange(5))
    loss = CausalLM()(model, batch)
    logits = model(batch).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=1e-10)
    assert loss.count == 5 * 31


def test_padding_and_given_labels_are_not_scored(text):
    model, batch = _decoder(), text.train.batch(torch.arange(3))
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 20:] = 0
    loss = CausalLM()(model, batch | {"attention_mask": mask})
    assert loss.count == 2 * 31 + 19
    labels = batch["input_ids"].clone()
    labels[:, :10] = -100
    assert CausalLM()(model, batch | {"labels": labels}).count == 3 * 22


def test_the_first_token_of_a_packed_document_is_not_predicted_from_another(text):
    model = _decoder()
    ids = text.train.batch(torch.arange(2))["input_ids"]
    segments = torch.zeros_like(ids)
    segments[:, 12:] = 1
    positions = torch.cat([torch.arange(12), torch.arange(20)]).expand_as(ids)
    packed = CausalLM()(model, {"input_ids": ids, "segment_ids": segments, "position_ids": positions})
    apart = [CausalLM()(model, {"input_ids": part}) for part in (ids[:, :12], ids[:, 12:])]
    assert packed.count == sum(p.count for p in apart)
    torch.testing.assert_close(packed.total, sum(p.total for p in apart), rtol=1e-10, atol=1e-10)


def test_masked_lm_scores_the_masked_positions_only(text):
    model, batch = _encoder(), text.train.batch(torch.arange(8))
    objective = MaskedLM(text, rate=0.3)
    loss = objective(model, batch, torch.Generator().manual_seed(3))
    from layerwise.data.masking import mask_tokens

    ids, labels = mask_tokens(
        batch["input_ids"],
        rate=0.3,
        mask_id=text.mask_id,
        vocab=text.vocab,
        special_ids=objective.special,
        generator=torch.Generator().manual_seed(3),
    )
    logits = model({"input_ids": ids}).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=1e-10)
    assert loss.count == (labels != -100).sum()
    again = objective(model, batch, torch.Generator().manual_seed(4))
    assert again.total != loss.total, "a new choice is masked every time"


def test_masked_lm_never_makes_all_logits(text, monkeypatch):
    model, batch = _encoder(), text.train.batch(torch.arange(4))
    rows = []
    import layerwise.objectives.language as language

    real = language.linear_cross_entropy
    monkeypatch.setattr(language, "linear_cross_entropy", lambda h, *a: rows.append(len(h)) or real(h, *a))
    loss = MaskedLM(text)(model, batch, torch.Generator().manual_seed(0))
    assert rows == [loss.count] and rows[0] < 0.4 * 4 * 32


def test_uniform_predictor_has_normalized_loss_one(text):
    model = _decoder()
    with torch.no_grad():
        model.head.weight.zero_()
    found = language_modeling(model, text, batches_at_most=2).metrics
    assert found["normalized_loss"] == pytest.approx(1, abs=1e-12)
    assert found["val_loss"] == pytest.approx(math.log(262), abs=1e-12)
    assert found["perplexity"] == pytest.approx(262)


def test_classification_counts_and_smooths(digits):
    data = preset("mlp")
    data["stack"] = {"layers": [{"kind": "dense", "channels": 32}], "inputs": 64}
    data["head"] |= {"classes": 10}
    data["embedding"] |= {"channels": 1, "size": [8, 8]}
    model, batch = build(model_spec(data)).double().eval(), digits.train.batch(torch.arange(20))
    batch["pixel_values"] = batch["pixel_values"].double()
    loss = Classification(smoothing=0.1)(model, batch)
    logits = model(batch).logits
    torch.testing.assert_close(loss.total, F.cross_entropy(logits, batch["labels"], reduction="sum", label_smoothing=0.1))
    assert loss.metrics["accuracy"] == (logits.argmax(1) == batch["labels"]).sum()


def test_wrong_head_and_missing_mask_token_are_refused(text):
    model = _decoder()
    model.head = None
    with pytest.raises(BadInput, match="head of kind lm"):
        CausalLM()(model, text.train.batch(torch.arange(2)))
    with pytest.raises(BadInput, match="mask token"):
        MaskedLM(dataclasses.replace(text, mask_id=None))
