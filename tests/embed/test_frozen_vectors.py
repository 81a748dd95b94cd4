"""Token vectors that are never trained, and language models composed on top of them."""

import numpy as np
import pytest
import torch

import layerwise as lw
from layerwise.data.spec import TokenizerSpec
from layerwise.data.tokenizer import make_tokenizer
from layerwise.embed.frozen import binary_table, glyph_bits, glyph_table, principal
from layerwise.errors import BadInput
from layerwise.evaluate.experts import composition
from layerwise.infer.ensemble import mean_logits
from layerwise.models.checkpoint import load, save
from layerwise.optim.spec import OptimizerSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec

TOKENS = make_tokenizer(TokenizerSpec("bytes"), [])
STRINGS = tuple(TOKENS.id_to_token(i) for i in range(262))
LAYER = {"causal": True, "heads": 2, "position": "rotary"}


def _model(seed=0, depth=3, **embedding):
    embedding = {"vocab": 262, "table": "glyphs", "strings": STRINGS, **embedding}
    return lw.load("decoder", seed=seed, embedding=embedding, stack={"depth": depth, "width": 32, "layer": LAYER})


def test_glyph_vectors_are_unit_rows_and_always_the_same():
    # Growing Transformers' card, check 2.
    table = glyph_table(STRINGS, 64)
    torch.testing.assert_close(table.norm(dim=1), torch.ones(262), rtol=0, atol=1e-6)
    assert torch.equal(table, glyph_table(STRINGS, 64))
    bits = glyph_bits(STRINGS)
    assert len(np.unique(bits, axis=0)) == 262


def test_without_reduction_distances_between_centred_bits_stay():
    # Check 3.
    bits = glyph_bits(STRINGS[:100])
    for size in (256, 300):
        scores = principal(bits, size)
        assert scores.shape == (100, size)
        torch.testing.assert_close(
            torch.cdist(scores, scores), torch.cdist(torch.from_numpy(bits), torch.from_numpy(bits)), rtol=1e-6, atol=1e-5
        )


def test_pictures_are_read_outward_from_the_centre():
    # A full stop has its ink low, an empty picture none; the middle of an 'x' comes first.
    x, blank = glyph_bits(["x", " "])
    assert x[:16].sum() > x[-64:].sum() and blank.sum() <= 3


def test_binary_codes_have_rank_sixteen():
    table = binary_table(262, 64)
    assert torch.linalg.matrix_rank(table.double(), rtol=1e-5) <= 16 and torch.equal(table, binary_table(262, 64))
    torch.testing.assert_close(table.norm(dim=1), torch.ones(262), rtol=0, atol=1e-6)


def test_training_leaves_the_vectors_alone(text, tmp_path):
    # Check 1: a buffer, in no optimizer, the same before and after, there again when loaded.
    model = _model()
    before = model.embedding.tokens.weight.clone()
    assert "embedding.tokens.weight" not in dict(model.named_parameters()) and not model.embedding.tokens.weight.requires_grad
    train(model, text, TrainSpec("causal-lm", steps=3, batch=4, optimizer=OptimizerSpec(lr=1e-2, weight_decay=0.1)))
    assert torch.equal(model.embedding.tokens.weight, before) and torch.equal(before, _model(seed=9).embedding.tokens.weight)
    save(model, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").embedding.tokens.weight, before)


def test_frozen_layers_on_frozen_vectors_keep_no_activations():
    # Check 4: below the block that is trained nothing has a graph.
    model = _model()
    for layer in model.stack.layers[:2]:
        layer.requires_grad_(False)
    seen = {}

    def look(i, layer, x, ctx, call):
        seen[i] = x.requires_grad
        return call(x, ctx)

    model({"input_ids": torch.arange(20).reshape(2, 10)}, around=(look,)).logits.sum().backward()
    assert seen == {0: False, 1: False, 2: False} and model.stack.layers[2].ffn.branch.up.weight.grad is not None


def test_a_missing_picture_is_refused():
    with pytest.raises(BadInput, match="each of the 262 tokens"):
        _model(strings=STRINGS[:5])


def test_copies_of_one_expert_answer_like_it_in_any_order():
    # Check 7: K copies are the expert; the order does not matter; averaging logits is not averaging probabilities.
    a, b, ids = _model(1), _model(2), {"input_ids": torch.arange(20).reshape(2, 10)}
    for model in (a, b):
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(3))
    assert torch.equal(mean_logits([a, a], ids), a(ids).logits)
    assert torch.equal(mean_logits([a, b], ids), mean_logits([b, a], ids))
    probabilities = torch.stack([m(ids).logits.softmax(-1) for m in (a, b)]).mean(0)
    assert (mean_logits([a, b], ids).softmax(-1) - probabilities).abs().max() > 1e-4
    with pytest.raises(BadInput, match="same tokens"):
        mean_logits([a, lw.load("decoder", embedding={"vocab": 50}, stack={"depth": 1, "width": 32, "layer": LAYER})], ids)


def test_the_averages_loss_is_at_most_the_average_of_losses(text, tmp_path):
    # Check 8, by the convexity of log-sum-exp; and each expert's own loss is what language modelling measures.
    a, b = _model(1), _model(2)
    for model, seed in ((a, 3), (b, 4)):
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(seed))
    folder = save(b, tmp_path / "b")
    found = composition(a, text, other=str(folder), batches_at_most=2).metrics
    assert found["mixed_val_loss"] < (found["this_val_loss"] + found["other_val_loss"]) / 2
    alone = lw.evaluate.language_modeling(a, text, batches_at_most=2).metrics["val_loss"]
    assert found["this_val_loss"] == pytest.approx(alone, rel=1e-5)
    best = composition(a, text, other=str(folder), batches_at_most=2, combine="best").metrics
    assert best["mixed_val_loss"] == min(found["this_val_loss"], found["other_val_loss"])
    joint = composition(a, text, other=str(folder), batches_at_most=2, combine="probabilities").metrics
    assert joint["mixed_val_loss"] != found["mixed_val_loss"]
