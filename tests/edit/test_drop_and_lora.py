"""Card 029: dropping layers, and LoRA that heals."""

import itertools

import pytest
import torch

import layerwise as lw
from layerwise.edit.adapt import lora, merge_lora, preview_lora
from layerwise.edit.drop import choose_block, drop_layers, preview_drop
from layerwise.edit.linears import merge, preview_merge, quantize_nf4
from layerwise.errors import BadInput
from layerwise.evaluate.language import language_modeling
from layerwise.infer.generate import generate
from layerwise.models.checkpoint import load, save
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.linear import LoRA
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec


def _model(depth=5, **layer):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 16, "init_std": 0.2}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    data["embedding"] = {"vocab": 262}
    return build(model_spec(data)).eval()


IDS = torch.arange(24).view(2, 12) % 262


def test_dropping_equals_the_path_around_and_a_hand_written_forward():
    model = _model()
    cut = drop_layers(model, layers=[1, 3])
    assert torch.equal(cut({"input_ids": IDS}).logits, model({"input_ids": IDS}, path=[0, 2, 4]).logits)
    from layerwise.stack.context import Context

    x = model.embedding({"input_ids": IDS}, torch.arange(12)[None])
    ctx = Context()
    ctx.begin(x, None)
    for i in (0, 2, 4):
        x = model.stack.layers[i](x, ctx, (i, 0))
    assert torch.equal(cut({"input_ids": IDS}).hidden, model.stack.norm(x))


def test_nothing_dropped_is_the_model_and_everything_dropped_is_embedding_norm_head():
    model = _model()
    assert torch.equal(drop_layers(model, layers=[]).forward({"input_ids": IDS}).logits, model({"input_ids": IDS}).logits)
    empty = drop_layers(model, layers=range(5))
    x = model.stack.norm(model.embedding.tokens(IDS))
    assert torch.equal(empty({"input_ids": IDS}).logits, x @ model.head.weight.T)


def test_dropping_identities_leaves_logits_bitwise_equal_and_angular_finds_them(text):
    model = _model()
    with torch.no_grad():
        for i in (2, 3):
            model.stack.layers[i].mixer.branch.o.weight.zero_()
            model.stack.layers[i].ffn.branch.down.weight.zero_()
    cut = drop_layers(model, text, count=2, rule="angular", samples=16)
    assert torch.equal(cut({"input_ids": IDS}).logits, model({"input_ids": IDS}).logits)


def test_cached_generation_after_dropping_equals_recomputation():
    cut = drop_layers(_model().double(), layers=[0, 2])
    made = generate(cut, IDS[:, :4], new=10)
    ids = IDS[:, :4]
    for _ in range(10):
        ids = torch.cat([ids, cut({"input_ids": ids}).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(made, ids)


def test_simple_rule_keeps_the_last_layer_for_every_count(text):
    model = _model()
    for n in range(1, 5):
        assert choose_block(model, text, count=n, rule="deepest") == list(range(4 - n, 4))
    with pytest.raises(BadInput, match="keeps the last layer"):
        choose_block(model, text, count=5, rule="deepest")


def test_rules(text):
    model = _model()
    assert choose_block(model, text, count=2, rule="shallowest") == [1, 2]
    drawn = {tuple(choose_block(model, text, count=2, rule="random", seed=s)) for s in range(40)}
    assert drawn == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert choose_block(model, text, count=2, rule="random", seed=3) == choose_block(model, text, count=2, rule="random", seed=3)
    best = choose_block(model, text, count=2, rule="best", samples=32)
    losses = {}
    for first in range(4):
        path = [i for i in range(5) if i not in (first, first + 1)]
        losses[first] = language_modeling(model, text, split="train", batches_at_most=2, path=path).metrics["val_loss"]
    assert best[0] == min(losses, key=losses.get)


def test_what_is_dropped_is_gone_and_what_stays_is_shared(tmp_path):
    model = _model()
    cut = drop_layers(model, layers=[1])
    assert cut.spec.stack.depth == 4 and model.spec.stack.depth == 5
    assert cut.stack.layers[1] is model.stack.layers[2]
    again = load(save(cut, tmp_path / "cut"))
    assert torch.equal(again({"input_ids": IDS}).logits, cut({"input_ids": IDS}).logits)


@pytest.mark.parametrize("arguments", [{}, {"count": 2, "layers": [1]}, {"layers": [5]}, {"layers": [-1]}, {"count": 6}, {"count": -1}])
def test_impossible_drops_are_refused_with_and_without_a_model(text, arguments):
    with pytest.raises(BadInput):
        drop_layers(_model(), text, **arguments)
    with pytest.raises(BadInput):
        preview_drop(_model().spec, **arguments)


def test_preview_has_the_depth_that_the_edit_makes(text):
    model = _model()
    assert preview_drop(model.spec, count=2).stack.depth == drop_layers(model, text, count=2).spec.stack.depth == 3
    assert preview_drop(model.spec, layers=[0]) == drop_layers(model, layers=[0]).spec


@pytest.mark.parametrize("targets", [("gate", "up", "down"), ("q", "v"), ("q", "k", "v", "o", "gate", "up", "down")])
def test_fresh_lora_changes_nothing_and_trains_only_itself(text, targets):
    model = _model()
    adapted = lora(model, rank=3, targets=targets)
    assert torch.equal(adapted({"input_ids": IDS}).logits, model({"input_ids": IDS}).logits)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {
        f"stack.layers.{i}.{'mixer' if t in 'qkvo' else 'ffn'}.branch.{t}.lora_{x}"
        for i, t, x in itertools.product(range(5), targets, "ab")
    }
    train(adapted, text, TrainSpec("causal-lm", steps=5, batch=4))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "the base is untouched"
    assert all(torch.equal(p, before[n]) for n, p in adapted.named_parameters() if n in before)
    assert not torch.equal(adapted({"input_ids": IDS}).logits, model({"input_ids": IDS}).logits)


def test_healing_in_four_bits_starts_where_the_pruned_model_stood_and_trains_feed_forward_terms_only(text):
    """Card 029, check 6, as QLoRA heals: drop, pack in NF4, attach, train."""
    cut = drop_layers(_model(), layers=[1, 2])
    packed = quantize_nf4(cut)
    healed = lora(packed, rank=2)
    dense = merge(packed)({"input_ids": IDS}).logits
    assert torch.equal(healed({"input_ids": IDS}).logits, packed({"input_ids": IDS}).logits)
    torch.testing.assert_close(packed({"input_ids": IDS}).logits, dense, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dense, cut({"input_ids": IDS}).logits)
    before = {n: t.clone() for n, t in healed.state_dict().items()}
    train(healed, text, TrainSpec("causal-lm", steps=3, batch=4))
    moved = {n for n, t in healed.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {f"stack.layers.{i}.ffn.branch.{t}.lora_{x}" for i, t, x in itertools.product(range(3), ("gate", "up", "down"), "ab")}


def test_merging_gives_the_same_outputs_and_a_plain_model(text, tmp_path):
    adapted = lora(_model().double(), rank=2, alpha=6.0, targets=["q", "down"])
    for module in adapted.modules():
        if isinstance(module, LoRA):
            torch.nn.init.normal_(module.lora_b)
    merged = merge_lora(adapted)
    torch.testing.assert_close(merged({"input_ids": IDS}).logits, adapted({"input_ids": IDS}).logits, rtol=1e-10, atol=1e-10)
    assert merged.spec.stack.layers == _model().spec.stack.layers and all(p.requires_grad for p in merged.parameters())
    assert not any(isinstance(m, LoRA) for m in merged.modules())
    kept = load(save(adapted, tmp_path / "adapted"))
    assert torch.equal(kept({"input_ids": IDS}).logits, adapted({"input_ids": IDS}).logits)
    assert [p.requires_grad for p in kept.parameters()] == [p.requires_grad for p in adapted.parameters()]


def test_lora_equals_peft():
    from peft import LoraConfig, get_peft_model

    linear = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False)).double()
    theirs = get_peft_model(linear, LoraConfig(r=2, lora_alpha=5, target_modules=["0"])).double()
    layer = theirs.base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    from layerwise.stack.parts_spec import LinearSpec

    ours = LoRA(6, 4, False, LinearSpec("lora", rank=2, alpha=5)).double()
    ours.load_state_dict(
        {"weight": layer.base_layer.weight, "lora_a": layer.lora_A["default"].weight, "lora_b": layer.lora_B["default"].weight}
    )
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_lora_refusals():
    model = _model()
    with pytest.raises(BadInput, match="merge it first"):
        lora(lora(model))
    with pytest.raises(BadInput, match="rank"):
        lora(model, rank=0)
    with pytest.raises(BadInput, match="no layer has a linear called gate"):
        lora(_model(ffn="gelu"), targets=["gate"])
    spec = preview_lora(model.spec, rank=2, alpha=None, dropout=0.0, targets=["up"], freeze=True)
    assert spec == lora(model, rank=2, targets=["up"]).spec and preview_merge(spec).stack.layers == model.spec.stack.layers


def test_evenly_and_randomly_spread_layers_leave_the_first_and_the_last():
    model = lw.load("decoder", embedding={"vocab": 40}, stack={"depth": 8, "width": 16, "layer": {"heads": 2}})
    assert [choose_block(model, None, count=n, rule="even") for n in (1, 2, 3, 6)] == [[4], [2, 5], [2, 4, 5], [1, 2, 3, 4, 5, 6]]
    drawn = [choose_block(model, None, count=3, rule="scattered", seed=s) for s in range(40)]
    assert all(len(set(d)) == 3 and d == sorted(d) for d in drawn) and {i for d in drawn for i in d} == set(range(1, 7))
    with pytest.raises(BadInput, match="at most 6 of 8"):
        choose_block(model, None, count=7, rule="even")
