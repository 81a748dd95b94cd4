"""Scores of layers and groups, and what pruners make of them, beside the numbers of published code."""

import pytest
import torch
from waves import Rows, decoder, golden, published, tokens

from layerwise.analyze.gradients import mean_gradients
from layerwise.analyze.groups import group_scores
from layerwise.analyze.scores import layer_scores
from layerwise.analyze.similarity import best_block, block_distances, distances
from layerwise.edit.prune.sparsity import centred, widths_of
from layerwise.edit.prune.structured import prune_width
from layerwise.train.policies.rates import importance, rates

DATA = Rows(tokens())


def test_adapt_pruner_scores_and_prunes_as_its_authors_code_does():
    wanted, model = golden("adapt_pruner"), decoder(3)
    scores = group_scores(model, DATA, "taylor")
    torch.testing.assert_close(scores.ffn[1].float(), torch.tensor(wanted["channel_scores"]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.groups[1].float(), torch.tensor(wanted["head_scores"]), rtol=1e-4, atol=1e-6)
    widths = widths_of(model.stack.spec)
    for heads, channels, found in zip(wanted["heads"], wanted["channels"], wanted["importance"], strict=True):
        keep = widths.weights(heads, channels) / widths.weights()
        made = prune_width(decoder(3), DATA, keep=keep, steps=wanted["steps"], amplitude=wanted["amplitude"], adapt="token-modification")
        assert [(s.kv_heads, s.ffn_width) for s in made.stack.spec.layers] == list(zip(heads, channels, strict=True))
        # The importance is that of the model as the step before left it.
        assert centred(layer_scores(model, DATA, "token-modification")) == pytest.approx(found, abs=2e-5)
        model = made
    for i, (layer, whole) in enumerate(zip(model.stack.layers, decoder(3).stack.layers, strict=True)):
        rows, all_rows = layer.ffn.branch.gate.weight, whole.ffn.branch.gate.weight
        assert torch.equal(rows, all_rows[wanted["kept"][i]])
        assert torch.equal(layer.mixer.branch.k.weight[::8], whole.mixer.branch.k.weight[::8][wanted["kept_heads"][i]])
    logits = model({"input_ids": tokens()}).logits[1, 5, :8]
    torch.testing.assert_close(logits.detach(), torch.tensor(wanted["logits"]), rtol=1e-4, atol=2e-5)


def test_blocks_turn_the_stream_as_far_as_pruneme_says():
    # It leaves out the embedding's output, so its states are ours from boundary 1 on.
    wanted = golden("prune_me")
    matrix = distances(decoder(5), Rows(tokens(), [16, 9, 12, 5]))[1:, 1:]
    for count, expected in wanted["distances"].items():
        assert block_distances(matrix, int(count)) == pytest.approx(expected, abs=2e-5)
        assert best_block(matrix, int(count)) + 1 == wanted["first"][count]


def test_adept_finds_the_importance_of_layers_and_tensors_that_its_authors_code_finds():
    wanted, model = golden("adept"), decoder(3)
    assert layer_scores(model, DATA, "layer-drop", batch=2) == pytest.approx(wanted["skipped"], abs=2e-6)
    names = [n for n, _ in model.named_parameters()]
    gradients = mean_gradients(model, DATA, names, samples=4, split="train", batch=2, objective="causal-lm", absolute=True)
    found = {published(n): importance(p.detach(), gradients[n]) for n, p in model.named_parameters()}
    assert found.keys() == wanted["importance"].keys()
    assert found == pytest.approx({n: i for n, (i, _) in wanted["importance"].items()}, rel=1e-4)
    assert rates(found) == pytest.approx({n: r for n, (_, r) in wanted["importance"].items()}, abs=1e-4)
