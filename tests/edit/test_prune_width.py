"""Pruned width: the exact checks of Adapt-Pruner's card, and limits that a wrong plan would break."""

import dataclasses

import pytest
import torch

import layerwise as lw
from layerwise.analyze.cost import costs
from layerwise.analyze.groups import group_scores
from layerwise.analyze.scores import layer_scores
from layerwise.edit.prune.sparsity import LARGEST, advance, centred, raised, stage_goals, widths_of
from layerwise.edit.prune.structured import best, preview_width, prune_width
from layerwise.edit.prune.width import cut_width
from layerwise.errors import BadInput
from layerwise.infer.generate import generate
from layerwise.jobs.check import check_job
from layerwise.jobs.schema import read_job
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.cache import Cache
from layerwise.objectives.distill import LogitDistillation
from layerwise.optim.schedule import factor
from layerwise.optim.spec import ScheduleSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec

IDS = {"input_ids": torch.arange(24).reshape(2, 12) % 50}
LAYER = {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 8, "kv_heads": 4, "head_dim": 6, "ffn_width": 24}
ADAPTED = {"adapt": "token-modification", "amplitude": 0.04, "steps": 20, "samples": 8}


def _model(depth=3, **layer):
    model = lw.load("decoder", seed=1, embedding={"vocab": 262}, stack={"depth": depth, "width": 32, "layer": LAYER | layer})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def _silent(layer):
    with torch.no_grad():
        for side in (layer.mixer.branch.o, layer.ffn.branch.down):
            side.weight.zero_()


def _weights(model):
    """The parameters along heads and inner channels, counted one by one."""
    names = ("q.", "k.", "v.", "o.weight", "gate.", "up.", "down.weight")
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith("stack.layers") and any(f"branch.{k}" in n for k in names))


def test_1_importance_has_mean_zero_and_largest_value_one():
    found = centred([-0.9, -0.7, -0.95, -0.2])
    assert sum(found) == pytest.approx(0, abs=1e-12) and max(map(abs, found)) == 1
    assert found[3] == 1 and found[2] == min(found)
    assert centred([-0.1] * 3) == [0.0] * 3 and centred([]) == []


@pytest.mark.parametrize("amplitude", [0.0, 0.005, 0.02])
def test_2_the_mean_sparsity_rises_by_one_step_whatever_the_amplitude(amplitude):
    importance, sparsity = centred([-0.9, -0.7, -0.95, -0.2]), [0.3] * 4
    for t in range(1, 6):
        sparsity = raised(sparsity, importance, 0.02, amplitude)
        assert sum(sparsity) / 4 == pytest.approx(0.3 + 0.02 * t, abs=1e-12)
    assert raised([0.0, 0.98], [1.0, -1.0], 0.02, 0.5) == [0.0, LARGEST]


def test_2_without_amplitude_it_is_a_plain_taylor_pruner(text):
    model = _model()
    plain = prune_width(model, text, keep=0.5, steps=20, samples=8)
    adapted = prune_width(model, text, keep=0.5, steps=20, adapt="token-modification", amplitude=0.0, samples=8)
    assert plain.spec == adapted.spec
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), adapted.state_dict().values(), strict=True))
    # In one step: the best half of every layer by the scores of the whole model.
    scores = group_scores(model, text, "taylor", samples=8)
    once = prune_width(model, text, keep=0.5, steps=1, samples=8)
    by_hand = cut_width(model, groups=[best(g, 2) for g in scores.groups], ffn=[best(f, 12) for f in scores.ffn])
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), by_hand.state_dict().values(), strict=True))
    assert {(s.kv_heads, s.heads, s.ffn_width) for s in plain.spec.stack.layers} == {(2, 4, 12)}


def test_3_an_identity_layer_is_least_important_and_loses_most(text):
    model = _model(depth=4)
    _silent(model.stack.layers[2])
    scores = layer_scores(model, text, "token-modification", samples=8)
    assert scores[2] == pytest.approx(-1, abs=1e-12)
    importance = centred(scores)
    assert importance[2] == min(importance)
    rises = raised([0.0] * 4, importance, 0.02, 0.01)
    assert max(rises) == rises[2] <= 0.02 + 0.01 and min(rises) >= 0.02 - 0.01
    pruned = prune_width(model, text, keep=0.6, **ADAPTED)
    widths = [s.ffn_width for s in pruned.spec.stack.layers]
    assert widths[2] == min(widths) < max(widths)
    for by in ("euclidean-change", "manhattan-change"):
        assert centred(layer_scores(model, text, by, samples=8))[2] == min(centred(layer_scores(model, text, by, samples=8)))


def test_4_a_pruned_model_is_the_model_with_zeroed_channels():
    model = _model(qkv_bias=True, ffn_bias=True, out_bias=True)
    groups, ffn = [[0, 3], [1], [0, 1, 2, 3]], [list(range(5, 20)), [7], list(range(24))]
    pruned = cut_width(model, groups=groups, ffn=ffn)
    masked = build(model.spec).eval()
    masked.load_state_dict(model.state_dict())
    with torch.no_grad():
        for layer, kept, channels in zip(masked.stack.layers, groups, ffn, strict=True):
            heads = torch.zeros(4, 2 * 6, dtype=torch.bool)  # two query heads of six channels share a key/value head
            heads[kept] = True
            layer.mixer.branch.o.weight[:, ~heads.flatten()] = 0
            gone = [j for j in range(24) if j not in channels]
            layer.ffn.branch.down.weight[:, gone] = 0
    torch.testing.assert_close(pruned(IDS).logits, masked(IDS).logits, rtol=1e-5, atol=1e-5)
    assert (pruned(IDS).logits - model(IDS).logits).abs().max() > 1e-2
    # Of the masked model, where these weights are zero already, nothing is lost.
    torch.testing.assert_close(cut_width(masked, groups=groups, ffn=ffn)(IDS).logits, masked(IDS).logits, rtol=1e-5, atol=1e-5)


def test_4_channels_of_no_weight_go_first_and_leave_the_logits(text):
    model = _model()
    with torch.no_grad():
        for layer in model.stack.layers:
            layer.mixer.branch.o.weight[:, 12:36] = 0  # query heads 2 to 5 read key/value heads 1 and 2
            layer.mixer.branch.k.weight[6:18] = 0
            layer.mixer.branch.v.weight[6:18] = 0
            layer.mixer.branch.q.weight[12:36] = 0
            layer.ffn.branch.down.weight[:, 3:15] = 0
            layer.ffn.branch.up.weight[3:15] = 0
            layer.ffn.branch.gate.weight[3:15] = 0
    for by in ("taylor", "magnitude", "activation"):
        pruned = prune_width(model, text, keep=0.5, by=by, samples=8, steps=4)
        torch.testing.assert_close(pruned(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_5_shapes_and_the_closed_form_of_the_count(text):
    model = _model(qkv_bias=True, ffn_bias=True)
    assert widths_of(model.spec.stack).weights() == _weights(model)
    pruned = prune_width(model, text, keep=0.55, **ADAPTED)
    count = 0
    for layer in pruned.stack.layers:
        a, f, spec = layer.mixer.branch, layer.ffn.branch, layer.spec
        assert a.q.weight.shape == (spec.kv_heads * 2 * 6, 32) and a.o.weight.shape == (32, spec.kv_heads * 2 * 6)
        assert a.k.weight.shape == a.v.weight.shape == (spec.kv_heads * 6, 32)
        assert f.gate.weight.shape == f.up.weight.shape == (spec.ffn_width, 32) and f.down.weight.shape == (32, spec.ffn_width)
        count += spec.kv_heads * 6 * ((2 + 2 + 1 + 1) * 32 + 2 + 1 + 1) + spec.ffn_width * (3 * 32 + 2)
    assert _weights(pruned) == widths_of(pruned.spec.stack).weights() == count
    assert len({(s.kv_heads, s.ffn_width) for s in pruned.spec.stack.layers}) > 1
    fresh = build(pruned.spec)
    assert {n: t.shape for n, t in fresh.state_dict().items()} == {n: t.shape for n, t in pruned.state_dict().items()}


@pytest.mark.parametrize("options", [{"steps": 7}, ADAPTED, ADAPTED | {"adapt": "layer-drop", "amplitude": 0.1, "by": "magnitude"}])
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
def test_5_as_many_weights_are_left_as_were_asked_for(text, keep, options):
    model = _model()
    pruned = prune_width(model, text, keep=keep, **options)
    assert keep * _weights(model) - 3 * max(widths_of(model.spec.stack).group_weights) <= _weights(pruned) <= keep * _weights(model)
    assert torch.isfinite(pruned(IDS).logits).all()


def test_the_table_of_widths_says_what_is_left(text, tmp_path):
    model = _model()
    lw.save(model, tmp_path / "first")
    pruned = prune_width(model, keep=[1.0, 0.5, 0.25], by="magnitude")
    found = lw.analyze.layer_widths(pruned, of=str(tmp_path / "first"))
    assert [row[1:4] for row in found.tables[0].rows] == [[8, 4, 24], [4, 2, 12], [2, 1, 6]]
    assert [row[5] for row in found.tables[0].rows] == [1.0, 0.5, 0.25]
    assert found.metrics["prunable_weights"] == _weights(pruned)
    assert found.metrics["kept_share"] == pytest.approx(_weights(pruned) / _weights(model))


def test_whole_heads_and_channels_go_as_the_published_pruner_counts_them():
    widths = widths_of(_model(depth=1).spec.stack)
    for s in torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist():
        for heads, channels in ((4, 24), (3, 17), (1, 1)):
            gone = channels - int(24 * (1 - s))
            lost = (heads * 6 - int(4 * 6 * (1 - s))) // 6  # floor(n / head_dim), of channels of key/value heads
            expected = [max(1, heads - max(lost, 0))], [max(1, channels - max(gone, 0))]
            assert widths.kept([s], [heads], [channels]) == expected


def test_never_below_one_head_and_one_channel(text):
    model = _model()
    widths = widths_of(model.spec.stack)
    sparsity, groups, channels = [0.0] * 3, list(widths.groups), list(widths.channels)
    for _ in range(60):
        if min(sparsity) == LARGEST:
            break
        sparsity, groups, channels = advance(widths, groups, channels, sparsity, [0.0] * 3, 0.05, 0.0, 0)
    assert groups == [1] * 3 and channels == [1] * 3
    with pytest.raises(BadInput, match="a head and a channel in every layer"):
        prune_width(model, text, keep=0.01)
    # With an amplitude that holds the important layers back for good, they lose once the others have nothing left.
    far = prune_width(model, text, keep=0.2, adapt="token-modification", amplitude=5.0, samples=8, by="magnitude")
    assert _weights(far) <= 0.2 * _weights(model)


def test_7_the_stages_end_where_one_stage_would_and_their_rate_has_no_jump():
    goals = stage_goals(1000, 500, 5)
    assert goals == [900, 800, 700, 600, 500] and stage_goals(1003, 501, 7)[-1] == 501
    whole = [factor(ScheduleSpec("wsd", warmup=0.05, decay=0.1, floor=0.0), s, 300) for s in range(300)]
    parts = [
        factor(ScheduleSpec("wsd", warmup=0.05, decay=0.1, floor=0.0, part=(k / 5, (k + 1) / 5)), s, 60)
        for k in range(5)
        for s in range(60)
    ]
    assert parts == whole and parts[14] == 1.0 and parts[299] < 0.04
    for bad in ((0.5, 0.5), (0.6, 0.2), (0.0, 1.2)):
        with pytest.raises(BadInput, match="part holds"):
            ScheduleSpec("wsd", part=bad)


def test_7_each_stage_reaches_its_share_of_the_first_model(text, tmp_path):
    model = _model()
    lw.save(model, tmp_path / "first")
    now, goals = model, stage_goals(_weights(model), _weights(model) // 2, 5)
    options = {"by": "magnitude", "adapt": "z-score"}  # of weights only, and untrained: stages then change nothing
    for k, goal in enumerate(goals, 1):
        now = prune_width(now, text, keep=1 - 0.1 * k, of=str(tmp_path / "first"), **options)
        assert goal - 2 * max(widths_of(model.spec.stack).group_weights) < _weights(now) <= goal + 1
    with pytest.raises(BadInput, match="cannot have been cut from it"):
        prune_width(build(dataclasses.replace(model.spec, stack=dataclasses.replace(model.spec.stack, depth=2))), text, keep=0.5, of=str(tmp_path / "first"))  # fmt: skip


def test_8_a_cache_with_layers_of_different_heads_changes_nothing(text):
    model = prune_width(_model(), text, keep=0.55, **ADAPTED)
    assert len({s.kv_heads for s in model.spec.stack.layers}) > 1
    ids = IDS["input_ids"]
    for path in (None, [0, 1, 1, 2], [0, 2]):
        cache, steps = Cache(), []
        with torch.no_grad():
            for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
                steps.append(model({"input_ids": part}, cache=cache, path=path).logits)
            torch.testing.assert_close(torch.cat(steps, 1), model(IDS, path=path).logits, rtol=1e-5, atol=1e-5)
    made = generate(model, ids, new=6)
    for _ in range(6):
        ids = torch.cat([ids, model({"input_ids": ids}).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids)


def test_shares_layer_by_layer_parts_and_the_stream(text):
    model = _model()
    found = prune_width(model, text, keep=[1.0, 0.5, 0.25], samples=8).spec.stack.layers
    assert [(s.kv_heads, s.ffn_width) for s in found] == [(4, 24), (2, 12), (1, 6)]
    assert {(s.kv_heads, s.ffn_width) for s in prune_width(model, text, keep=0.5, parts="ffn", by="magnitude").spec.stack.layers} == {
        (4, 12)
    }
    assert {(s.kv_heads, s.ffn_width) for s in prune_width(model, text, keep=0.5, parts="heads", by="magnitude").spec.stack.layers} == {
        (2, 24)
    }
    narrow = prune_width(model, text, keep=1.0, width=20, by="magnitude")
    assert narrow.spec.stack.width == 20 and [s.ffn_width for s in narrow.spec.stack.layers] == [24] * 3
    both = prune_width(model, text, keep=0.5, width=20, samples=8, steps=2)
    assert _weights(both) <= 0.5 * _weights(model) and both(IDS).hidden.shape[-1] == 20


@pytest.mark.parametrize(
    "options",
    [{"keep": 0.5}, {"keep": 0.7, "steps": 20}, {"keep": [0.5, 1.0, 0.75]}, {"keep": 0.5, "parts": "ffn"}, {"keep": 0.4, "width": 16}],
)
def test_the_preview_is_what_is_made(text, options):
    model = _model()
    assert prune_width(model, text, by="magnitude", **options).spec == preview_width(model.spec, **options)


def test_the_preview_of_adapted_widths_differs_from_layer_to_layer():
    spec = preview_width(_model().spec, keep=0.5, adapt="token-modification")
    assert len({s.ffn_width for s in spec.stack.layers}) > 1
    assert preview_width(spec, keep=0.9, of="stage:later") == spec


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0.0}, "share in"),
        ({"keep": [0.5, 0.5]}, "one for each of 3"),
        ({"keep": [0.5, 0.5, 0.5], "adapt": "taylor"}, "one number"),
        ({"keep": 0.5, "steps": 0}, "steps at least 1"),
        ({"keep": 0.5, "width": 64}, "asked for 64"),
    ],
)
def test_what_cannot_be_pruned_is_refused(options, words):
    with pytest.raises(BadInput, match=words):
        preview_width(_model().spec, **options)


def test_models_with_parts_that_cannot_be_cut_are_refused():
    model = _model()
    with pytest.raises(BadInput, match="only dense ones are cut"):
        preview_width(lw.edit.lora(model, rank=2).spec, keep=0.5)
    alibi = dataclasses.replace(model.spec, stack=dataclasses.replace(model.spec.stack, layer=dataclasses.replace(model.spec.stack.layer, position="alibi")))  # fmt: skip
    with pytest.raises(BadInput, match="cut ffn only"):
        preview_width(alibi, keep=0.5)
    assert preview_width(alibi, keep=0.5, parts="ffn").stack.layers[0].ffn_width == 12
    with pytest.raises(BadInput, match="one stack"):
        preview_width(model_spec(preset("encoder-decoder")), keep=0.5)
    with pytest.raises(BadInput, match="one stack, of transformer layers"):
        preview_width(model_spec(preset("vgg")), keep=0.5)


def test_layers_of_different_widths_go_through_other_edits_and_training(text, tmp_path):
    model = _model()
    pruned = prune_width(model, keep=[1.0, 0.5, 0.25], by="magnitude")
    wide, narrow = ([costs(m, IDS)[i].flops for i in range(3)] for m in (model, pruned))
    assert wide[0] == narrow[0] > narrow[1] > narrow[2] and narrow[1] == wide[1] // 2
    packed = lw.edit.quantize(pruned, text, bits=8, samples=8)
    torch.testing.assert_close(packed(IDS).logits, pruned(IDS).logits, rtol=0.1, atol=0.1)
    adapted = lw.edit.merge_lora(lw.edit.lora(pruned, rank=2))
    dropped = lw.edit.drop_layers(adapted, layers=[1])
    assert [s.ffn_width for s in dropped.spec.stack.layers] == [24, 6] and torch.isfinite(dropped(IDS).logits).all()
    lw.save(model, tmp_path / "teacher")
    taught = {"teacher": str(tmp_path / "teacher"), "temperature": 2.0}  # the paper's recovery with distillation, of a wider teacher
    before = LogitDistillation(**taught)(pruned, text.train.batch(torch.arange(8))).mean.item()
    train(pruned, text, TrainSpec("logit-distillation", options=taught, steps=8, batch=8), seed=0)
    assert LogitDistillation(**taught)(pruned, text.train.batch(torch.arange(8))).mean.item() < before


@pytest.mark.parametrize(
    ("preset", "prune", "words"),
    [
        (
            "decoder",
            {"adapt": "token-modification"},
            r"stages.out: no Hugging Face family.*layer 1 has .* and layer 0 has .*export: layerwise",
        ),
        ("bert", {}, "stages.prune: causal-lm needs causal layers"),
        ("bert", {"objective": "masked-lm"}, "layer 0 has head_dim 8; bert layers have 16"),
        ("encoder-decoder", {"by": "magnitude"}, "stages.prune: widths are cut in models with one stack"),
        ("decoder", {}, None),
        ("bert", {"by": "magnitude", "parts": "ffn"}, None),
    ],
)
def test_a_job_that_cannot_work_is_refused_before_it_begins(verses, preset, prune, words):
    model = {"preset": preset, "stack": {"depth": 3} | ({} if preset == "encoder-decoder" else {"width": 32})}
    stages = {"prune": {"edit": "prune-width", "keep": 0.5, **prune}, "out": {"export": "hf"}}
    data = {"source": f"path:{verses}", "length": 32, "tokenizer": {"kind": "bytes"}}
    job = read_job({"name": "small", "data": data, "model": model, "stages": stages})
    if words is None:
        check_job(job)
    else:
        with pytest.raises(BadInput, match=words):
            check_job(job)
