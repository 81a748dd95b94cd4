"""Building models: seeded and whole, every preset runs, heads and pooling, precisions, convolutional stacks, encoder-decoders."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerwise.embed.spec import PixelSpec
from layerwise.errors import BadInput
from layerwise.models.heads import pool
from layerwise.models.model import build
from layerwise.models.plain_spec import PlainLayerSpec, PlainStackSpec
from layerwise.models.presets import PRESETS, preset
from layerwise.models.spec import HeadSpec, ModelSpec, model_spec
from layerwise.nn.cache import Cache
from layerwise.nn.linear import LoRA
from layerwise.stack.record import record
from layerwise.stack.surgery import keep

IDS = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
PIXELS = {"pixel_values": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
TEXT, IMAGES = ("decoder", "bert", "encoder", "encoder-decoder"), ("mlp", "vgg", "resnet", "vit")


def _spec(name, head=None, **layer):
    data = preset(name)
    if name in IMAGES:
        if name != "vit":
            data["stack"]["inputs"] = 192 if name == "mlp" else 3
        data["head"]["classes"] = 5
        data["embedding"] |= {"channels": 3, "size": [8, 8]}
        return model_spec(data)
    for part in ("stack", "decoder"):
        if part in data:
            data[part] |= {"depth": 2, "width": 16, "init_std": 0.3}
            data[part]["layer"] |= {"heads": 2, **layer}
    data["embedding"] = {**data.get("embedding", {}), "vocab": 40}
    data["head"] = data["head"] if head is None else head
    return model_spec(data)


def _batch(name):
    return PIXELS if name in IMAGES else {"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}


def _plain(*layers, inputs=3, **pixels):
    pixels = PixelSpec(channels=3, size=(8, 8), **pixels)
    return build(ModelSpec(pixels, PlainStackSpec(tuple(layers), inputs=inputs), HeadSpec("classifier", bias=True, classes=5)))


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_is_built_whole_from_its_seed_alone_and_runs(name):
    before = torch.get_rng_state()
    a, b, other = (build(_spec(name), seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is untouched"
    torch.manual_seed(99)
    again = build(_spec(name), seed=3)
    tensors = a.state_dict()
    for twin in (b, again):
        assert all(torch.equal(t, tensors[n]) for n, t in twin.state_dict().items())
    assert any(not torch.equal(t, tensors[n]) for n, t in other.state_dict().items())
    assert not any(t.is_meta for t in [*a.parameters(), *a.buffers()]) and all(t.isfinite().all() for t in tensors.values())
    with torch.no_grad():
        for p in build(_spec(name), seed=3).parameters():
            p.fill_(float("nan"))  # dirty memory that a later build may get
    assert all(torch.equal(t, tensors[n]) for n, t in build(_spec(name), seed=3).state_dict().items()), "nothing is left as it was found"
    out = a.eval()(_batch(name), hiddens=True)
    assert out.logits.shape == ((4, 5) if name in IMAGES else (2, 6, 40))
    assert len(out.hiddens) == (a.decoder or a.stack).depth and out.logits.isfinite().all()
    assert all(p.requires_grad for p in a.parameters())
    a.train()(_batch(name)).logits.logsumexp(-1).sum().backward()
    idle = {"embedding.types.weight"}
    assert {n for n, p in a.named_parameters() if p.grad is None} <= idle


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_run_in_other_precisions(name, dtype):
    model = build(_spec(name)).eval()
    plain = model(_batch(name)).logits
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in _batch(name).items()}
    out = model.to(dtype)(batch)
    assert out.logits.dtype == out.hidden.dtype == dtype
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.06 * plain.abs().max().item()}
    torch.testing.assert_close(out.logits.float(), plain, **close)


@pytest.mark.parametrize("position", ["none", "rotary", "alibi", "relative"])
def test_bfloat16_with_every_position_kind_padding_and_cache(position):
    model = build(_spec("decoder", position=position, kv_heads=1, window=3, qk_norm=True)).to(torch.bfloat16).eval()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    whole = model({"input_ids": IDS, "attention_mask": mask}).logits
    cache = Cache()
    parts = [model({"input_ids": IDS[:, :4], "attention_mask": mask[:, :4]}, cache=cache).logits]
    parts += [model({"input_ids": IDS[:, 4:], "attention_mask": mask}, cache=cache).logits]
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_pool_reduces_the_real_positions(how):
    hidden = torch.randn(5, 6, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1], [1] * 6, [1, 0, 1, 0, 1, 0]]).bool()
    for row in range(5):
        real = [hidden[row, i] for i in range(6) if mask[row, i]]
        expected = {"mean": sum(real) / len(real), "first": real[0], "last": real[-1]}[how]
        torch.testing.assert_close(pool(hidden, how, mask)[row], expected)
    assert torch.equal(pool(hidden, how), {"mean": hidden.mean(1), "first": hidden[:, 0], "last": hidden[:, -1]}[how])
    assert pool(hidden, how, torch.zeros(5, 6, dtype=torch.bool)).isfinite().all()
    image, flat = torch.randn(2, 3, 4, 5), torch.randn(2, 3)
    torch.testing.assert_close(pool(image, how), image.flatten(2).mean(2))
    assert pool(flat, how) is flat


@pytest.mark.parametrize("how", ["mean", "first", "last"])
def test_a_text_classifier_sees_no_padding(how):
    model = build(_spec("encoder", head={"kind": "classifier", "classes": 3, "pool": how, "bias": True})).double().eval()
    plain = model({"input_ids": IDS})
    torch.testing.assert_close(plain.logits, model.head.out(pool(plain.hidden, how)))
    for left, right in ((2, 0), (0, 3), (1, 1)):
        ids = torch.cat([torch.full((2, left), 1), IDS, torch.full((2, right), 2)], dim=1)
        mask = torch.tensor([0] * left + [1] * 6 + [0] * right).expand(2, -1)
        torch.testing.assert_close(model({"input_ids": ids, "attention_mask": mask}).logits, plain.logits, rtol=1e-12, atol=1e-12)


def test_logits_are_made_when_asked_for_only():
    model, calls = build(_spec("decoder")), []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    out = model({"input_ids": IDS})
    assert not calls and torch.equal(out.logits, out.hidden @ model.head.weight.T) and len(calls) == 1
    out.hidden = out.hidden[:, -1:]
    assert out.logits.shape == (2, 1, 40)
    bare = model.with_head(None, None)
    assert torch.equal(bare({"input_ids": IDS}).hidden, model({"input_ids": IDS}).hidden) and model.head is not None
    with pytest.raises(AttributeError, match="no head"):
        _ = bare({"input_ids": IDS}).logits


def test_tied_heads_multiply_by_the_embedding_and_own_no_matrix():
    model = build(_spec("bert")).eval()
    assert model.head.weight is None
    out = model({"input_ids": IDS})
    features = model.head.norm(F.gelu(model.head.dense(out.hidden)))
    torch.testing.assert_close(out.logits, features @ model.embedding.tokens.weight.T + model.head.bias)
    both = build(_spec("encoder-decoder"))
    out = both({"input_ids": IDS, "decoder_input_ids": IDS})
    torch.testing.assert_close(out.logits, out.hidden @ both.embedding.tokens.weight.T)


def test_scaled_initialisation_divides_what_writes_the_stream():
    data = preset("decoder")
    data["stack"] |= {"depth": 6, "width": 64, "scaled_init": True, "init_std": 0.05}
    data["stack"]["layer"] |= {"heads": 4, "qkv_bias": True}
    model = build(model_spec(data | {"embedding": {"vocab": 200}}))
    for role in ("q", "k", "v", "o", "gate", "up", "down"):
        weights = torch.cat([getattr((x.mixer if role in "qkvo" else x.ffn).branch, role).weight.flatten() for x in model.stack.layers])
        assert weights.std().item() == pytest.approx(0.05 / (12**0.5 if role in ("o", "down") else 1), rel=0.03), role
    assert model.embedding.tokens.weight.std().item() == pytest.approx(0.05, rel=0.03)
    assert model.head.weight.std().item() == pytest.approx(0.05, rel=0.03)
    assert all((p == 1).all() for n, p in model.named_parameters() if "norm" in n)
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias"))


def test_layers_of_a_model_do_not_start_alike():
    layers = build(_spec("decoder")).stack.layers
    assert not torch.equal(layers[0].ffn.branch.up.weight, layers[1].ffn.branch.up.weight)


def test_adapters_alone_are_trained_and_start_at_nothing():
    linears = {"q": {"kind": "lora", "rank": 2}, "down": {"kind": "lora", "rank": 3}}
    plain = _spec("decoder", linears=linears)
    model = build(dataclasses.replace(plain, adapters_only=True)).eval()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in n for n in trained)
    assert len(trained) == 2 * sum(isinstance(m, LoRA) for m in model.modules()) == 8
    q = model.stack.layers[0].mixer.branch.q
    assert torch.equal(q.materialize(), q.weight)


def test_encoder_decoder_shapes_and_causality():
    model = build(_spec("encoder-decoder")).double().eval()
    source, target = IDS, torch.randint(0, 40, (2, 9))
    out = model({"input_ids": source, "decoder_input_ids": target})
    assert out.hidden.shape == (2, 9, 16) and out.memory.shape == (2, 6, 16) and out.logits.shape == (2, 9, 40) and model.causal
    for t in (1, 4, 8):
        changed = target.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 40
        again = model({"input_ids": source, "decoder_input_ids": changed}).logits
        torch.testing.assert_close(again[:, :t], out.logits[:, :t], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(again[:, t], out.logits[:, t])
    other = source.clone()
    other[:, -1] = (other[:, -1] + 1) % 40
    moved = model({"input_ids": other, "decoder_input_ids": target})
    assert not torch.allclose(moved.memory[:, 0], out.memory[:, 0]), "the encoder sees both sides"
    assert not torch.allclose(moved.logits[:, 0], out.logits[:, 0]), "the decoder sees the whole source"
    given = model({"decoder_input_ids": target}, memory=out.memory)
    assert torch.equal(given.logits, out.logits)
    half = model({"input_ids": source, "decoder_input_ids": target}, path=[0])
    assert torch.equal(half.memory, out.memory) and not torch.equal(half.hidden, out.hidden), "a path is the decoder's"


def test_impossible_models_are_refused():
    for data, message in (
        ({"stack": {"layers": [{"channels": 4}]}}, "set embedding.kind to pixels"),
        ({"stack": {"layer": {"cross": True}}}, "needs something to look at"),
        ({"decoder": {"depth": 1, "layer": {"causal": True}}}, "cross: true and causal: true"),
        ({"embedding": {"size": 8}, "head": {"tie": True}}, "tied head"),
        ({"head": {"dropout": 1.0}}, "probability"),
    ):
        with pytest.raises((BadInput, ValueError), match=message):
            model_spec(data)


def test_a_vgg_is_a_sequential_in_training_and_evaluation_with_its_gradients():
    model = _plain(
        PlainLayerSpec(channels=4, bias=True),
        PlainLayerSpec(channels=6, size=5, pool=True, norm="none"),
        PlainLayerSpec(channels=8, size=1, norm="group", group=2),
        PlainLayerSpec(channels=8, stride=2, affine=False),
        mean=0.4,
        std=0.2,
    ).double()
    reference = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 5, padding=2, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 1, bias=False), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).double()  # fmt: skip
    reference.load_state_dict(dict(zip(reference.state_dict(), model.state_dict().values(), strict=True)))
    x = PIXELS["pixel_values"].double()
    for training in (True, True, False):
        model.train(training), reference.train(training)
        ours, theirs = model({"pixel_values": x}).logits, reference((x - 0.4) / 0.2)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        grads = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in ((ours, model), (theirs, reference))]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)  # running statistics too


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (8, 1), (4, 2), (8, 2)])
def test_a_residual_block_is_relu_of_its_branch_plus_its_shortcut(channels, stride, norm):
    model = _plain(PlainLayerSpec(channels=4), PlainLayerSpec("residual", channels, stride=stride, norm=norm, group=2)).double().eval()
    block, x = model.stack.layers[1], torch.randn(2, 4, 8, 8, dtype=torch.float64)

    def n(y, module):
        if norm == "batch":
            return (y - module.running_mean[:, None, None]) / (module.running_var[:, None, None] + 1e-5).sqrt()
        if norm == "group":
            g = y.unflatten(1, (-1, 2))
            return ((g - g.mean((2, 3, 4), keepdim=True)) / (g.var((2, 3, 4), unbiased=False, keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
        return y

    if norm == "batch":
        for part in (block.norm, block.second_norm, block.shortcut_norm):
            if part is not None:
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
    inner = n(F.conv2d(x, block.weight.weight, stride=stride, padding=1), block.norm).relu()
    branch = n(F.conv2d(inner, block.second.weight, padding=1), block.second_norm)
    same = channels == 4 and stride == 1
    bypass = x if same else n(F.conv2d(x, block.shortcut.weight, stride=stride), block.shortcut_norm)
    torch.testing.assert_close(block(x), (branch + bypass).relu(), rtol=1e-10, atol=1e-12)
    assert (block.shortcut is None) == same and block(x).shape == (2, channels, 8 // stride, 8 // stride)


def test_paths_records_and_cuts_of_a_convolutional_stack():
    model = _plain(PlainLayerSpec(channels=4), *[PlainLayerSpec("residual", 4)] * 3, PlainLayerSpec("residual", 8, stride=2)).eval()
    seen = record(model, PIXELS, hidden="all", inputs="all")
    x = (PIXELS["pixel_values"] - 0.5) / 0.5
    for i, layer in enumerate(model.stack.layers):
        assert torch.equal(seen.inputs[i], x)
        x = layer(x)
        assert torch.equal(seen.hidden[i], x)
    assert torch.equal(seen.output.hidden, x) and torch.equal(seen.output.pooled, x.mean((2, 3)))
    path = [0, 3, 1, 1, 4]
    x = (PIXELS["pixel_values"] - 0.5) / 0.5
    for i in path:
        x = model.stack.layers[i](x)
    assert torch.equal(model(PIXELS, path=path).hidden, x)
    cut = model.with_stack(keep(model.stack, [0, 2, 4]))
    assert torch.equal(cut(PIXELS).logits, model(PIXELS, path=[0, 2, 4]).logits)
    twin = build(cut.spec).eval()
    twin.load_state_dict(cut.state_dict())
    assert torch.equal(twin(PIXELS).logits, cut(PIXELS).logits)
    with pytest.raises(BadInput, match="takes 4 channels but the layer below makes 3"):
        keep(model.stack, [1, 4])


def test_convolutions_start_he_normal():
    model = _plain(PlainLayerSpec(channels=64), PlainLayerSpec("residual", 64))
    layer = model.stack.layers[1]
    for conv in (layer.weight, layer.second):
        assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
