"""Cutting widths and cloning small models out of large ones: exact where nothing is lost, one choice of neurons everywhere."""

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.analyze.groups import group_scores
from layerwise.analyze.importance import neuron_importance
from layerwise.edit import PREVIEWS
from layerwise.edit.cloning import kept_blocks
from layerwise.edit.prune.width import LAYER, OUTSIDE, cut_width
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.table import lookup

IDS = {"input_ids": torch.arange(24).reshape(2, 12) % 50}
BASE = {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 4, "kv_heads": 2, "ffn_width": 24}


def _model(tie=False, depth=3, embedding=None, **layer):
    model = lw.load("decoder", seed=1, embedding={"vocab": 262, **(embedding or {})}, stack={"depth": depth, "width": 32, "layer": {**BASE, **layer}}, head={"tie": tie})  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def _orders(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    depth = model.stack.depth
    return {
        "stream": torch.randperm(32, generator=generator).tolist(),
        "groups": [torch.randperm(2, generator=generator).tolist() for _ in range(depth)],
        "ffn": [torch.randperm(24, generator=generator).tolist() for _ in range(depth)],
    }


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        {},
        {"norm": "layernorm", "ffn": "gelu", "qkv_bias": True, "out_bias": True, "ffn_bias": True, "qk_norm": True},
        {"placement": "sandwich", "head_scale": "before", "ffn_norm": True, "residual_gain": True, "layer_scale": 0.5},
    ],
)
def test_reordering_neurons_changes_no_output(layer, tie):
    # Card 107, check 1.
    model = _model(tie, embedding={"position": "learned", "types": 2, "norm": "layernorm"}, **layer)
    permuted = cut_width(model, **_orders(model), rescale=True)
    torch.testing.assert_close(permuted(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(permuted.stack.layers[0].ffn.branch.down.weight, model.stack.layers[0].ffn.branch.down.weight)
    assert permuted.spec == model.spec.__class__(**{**vars(model.spec), "stack": permuted.spec.stack})


def test_a_clone_of_the_same_size_is_the_parent(text):
    # Check 2; and check 3: no storage is shared.
    model = _model()
    clone = lw.edit.subclone(model, text)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), clone.state_dict().values(), strict=True))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in clone.parameters()}


@pytest.mark.parametrize("tie", [False, True])
def test_a_clone_has_the_shapes_of_a_fresh_destination(text, tie):
    # Checks 3 and 8.
    model = _model(tie, depth=4)
    options = {"depth": 2, "width": 16, "kv_heads": 1, "ffn_width": 12}
    clone = lw.edit.subclone(model, text, **options)
    assert clone.spec == lookup(PREVIEWS, "subclone", "preview")(model.spec, **options)
    fresh = build(clone.spec)
    assert {n: t.shape for n, t in clone.state_dict().items()} == {n: t.shape for n, t in fresh.state_dict().items()}
    assert clone.spec.stack.layers[0].head_dim == 8 and clone.spec.stack.layers[0].heads == 2
    assert (clone.head.weight is None) == tie
    assert all(p.requires_grad for p in clone.parameters())
    assert torch.isfinite(clone(IDS).logits).all()


def test_every_tensor_uses_the_same_choice_of_stream_neurons():
    # Check 4: neuron j of the stream carries the value j in every tensor that touches it.
    model = _model(norm="layernorm", qkv_bias=True, out_bias=True, ffn_bias=True)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            axes = LAYER[name.split(".", 3)[3]] if name.startswith("stack.layers.") else OUTSIDE[name]
            if "stream" in axes:
                shape = [1] * tensor.dim()
                shape[axes.index("stream")] = 32
                tensor.copy_(torch.arange(32.0).reshape(shape).expand_as(tensor))
    chosen = [3, 30, 7, 11]
    small = cut_width(model, stream=chosen)
    met = 0
    for name, tensor in small.named_parameters():
        axes = LAYER[name.split(".", 3)[3]] if name.startswith("stack.layers.") else OUTSIDE[name]
        if "stream" in axes:
            rows = tensor.movedim(axes.index("stream"), 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]
            assert rows.unique(dim=1).flatten().tolist() == chosen, name
            met += 1
    assert met == 4 + 3 * 13


def test_dropping_zero_heads_and_inner_channels_changes_nothing():
    model = _model(depth=2)
    with torch.no_grad():
        for layer in model.stack.layers:
            layer.mixer.branch.v.weight[8:] = 0  # the second key/value head
            layer.ffn.branch.up.weight[10:] = 0
    small = cut_width(model, groups=[[0], [0]], ffn=[list(range(10))] * 2)
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert small.spec.stack.layers[0].heads == 2 and small.spec.stack.layers[0].ffn_width == 10


def test_dropping_zero_stream_neurons_is_exact_once_the_norms_count_is_right():
    # Check 5: 12 of 32 stream neurons are zero everywhere; RMSNorm's mean over 20 instead of 32 is put right by gain and epsilon.
    model = _model(depth=2, norm_eps=1e-3)
    with torch.no_grad():
        model.embedding.tokens.weight[:, 20:] = 0
        for layer in model.stack.layers:
            layer.mixer.branch.o.weight[20:] = 0
            layer.ffn.branch.down.weight[20:] = 0
    small = cut_width(model, stream=list(range(20)))
    assert (small(IDS).logits - model(IDS).logits).abs().max() > 1e-2
    # g x / sqrt(S / 32 + e) = g sqrt(32 / 20) x / sqrt(S / 20 + e 32 / 20)
    with torch.no_grad():
        for module in small.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.mul_((32 / 20) ** 0.5)
                module.eps *= 32 / 20
    torch.testing.assert_close(small(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_rescaling_keeps_the_spread_of_what_a_matrix_gives():
    # Check 6; and embeddings are not multiplied, while a tied head reads a multiplied stream.
    model = lw.load("decoder", seed=1, embedding={"vocab": 262}, stack={"depth": 1, "width": 512, "layer": {"heads": 4, "ffn_width": 64}}, head={"tie": True})  # fmt: skip
    small = cut_width(model, stream=list(range(128)), rescale=True)
    x = torch.randn(10_000, 512, generator=torch.Generator().manual_seed(0))
    for role in ("q", "k", "v"):
        before = getattr(model.stack.layers[0].mixer.branch, role)(x).std()
        after = getattr(small.stack.layers[0].mixer.branch, role)(x[:, :128]).std()
        assert after.item() == pytest.approx(before.item(), rel=0.05)
    assert torch.equal(small.embedding.tokens.weight, model.embedding.tokens.weight[:, :128])
    assert small.spec.head.scale == 2.0


def test_importance_is_the_mean_absolute_activation_and_finds_large_neurons(text):
    model = _model()
    found = neuron_importance(model, text, samples=4, batch=2)
    rows = text.train.batch(torch.tensor([0, 1]))
    assert found.stream.shape == (32,) and [len(f) for f in found.ffn] == [24] * 3 and [len(g) for g in found.groups] == [2] * 3
    one = neuron_importance(model, text, samples=2, batch=2)
    stream = lw.record(model, rows, hidden="all", inputs=[0]).stream()
    torch.testing.assert_close(
        one.stream.float(), torch.stack([s.abs().mean(dim=(0, 1)) for s in stream]).mean(dim=0), rtol=1e-4, atol=1e-6
    )
    with torch.no_grad():
        model.embedding.tokens.weight[:, 5] = torch.where(torch.arange(262) % 2 == 0, 50.0, -50.0)  # signed values would cancel
        model.stack.layers[1].ffn.branch.up.weight[7] *= 100
        model.stack.layers[2].mixer.branch.v.weight[8:] *= 100
    found = neuron_importance(model, text, samples=8)
    assert found.stream.argmax() == 5 and found.ffn[1].argmax() == 7 and found.groups[2].argmax() == 1
    clone = lw.edit.subclone(model, text, width=4)
    assert (clone.embedding.tokens.weight.abs() == 50.0).all(dim=0).any()


def test_other_scores_choose_neurons_too(text):
    model = _model()
    with torch.no_grad():
        model.stack.layers[1].ffn.branch.gate.weight[3] *= 50
    scores = group_scores(model, text, "magnitude")
    clone = lw.edit.subclone(model, text, ffn_width=6, choose="magnitude", rescale=False)
    kept = sorted(scores.ffn[1].topk(6).indices.tolist())
    assert 3 in kept and torch.equal(clone.stack.layers[1].ffn.branch.down.weight, model.stack.layers[1].ffn.branch.down.weight[:, kept])


def test_blocks_are_taken_from_the_middle():
    assert kept_blocks(32, 8, "ends") == [0, 1, 2, 3, 28, 29, 30, 31]
    assert kept_blocks(8, 3, "ends") == [0, 1, 7]
    assert kept_blocks(8, 3, "first") == [0, 1, 2] and kept_blocks(8, 3, "last") == [5, 6, 7]


def test_removing_a_silent_block_changes_nothing(text):
    # Check 7.
    model = _model(depth=2)
    grown = lw.edit.grow(model, order=[0, None, 1], silent=True)
    clone = lw.edit.subclone(grown, text, depth=2)
    assert torch.equal(clone(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 4}, "1 to 3 layers"),
        ({"width": 64}, "asked for 64"),
        ({"kv_heads": 3}, "2 key/value heads"),
        ({"ffn_width": 0}, "asked for"),
    ],
)
def test_a_destination_larger_than_the_parent_is_refused(text, options, words):
    with pytest.raises(BadInput, match=words):
        lw.edit.subclone(_model(), text, **options)


def test_what_cannot_be_cut_is_refused():
    model = _model()
    for options in ({"stream": [0, 0]}, {"stream": [40]}, {"ffn": [[1]]}):
        with pytest.raises(BadInput):
            cut_width(model, **options)
    with pytest.raises(BadInput, match="dense"):
        cut_width(lw.edit.lora(model, rank=2), stream=[1, 2])
