"""Surgery shares weights and keeps the spec true; records equal what was computed; layers of any network are found."""

import pytest
import torch
from torch import nn

from layerwise.errors import BadInput
from layerwise.models.model import Model, build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.stack.context import Context
from layerwise.stack.depth import depth_of, view
from layerwise.stack.record import record
from layerwise.stack.spec import LayerSpec, StackSpec
from layerwise.stack.stack import Stack
from layerwise.stack.surgery import insert, keep, repeat, replace

IDS = torch.arange(14).view(2, 7)


def _model(name="decoder", depth=4, overrides=None, **layer):
    data = preset(name)
    for part in ("stack", "decoder"):
        if part in data:
            data[part] |= {"depth": depth, "width": 16, "init_std": 0.3}
            data[part]["layer"] |= {"heads": 2, **layer}
    data["stack"]["overrides"] = overrides or {}
    data["embedding"] = {**data.get("embedding", {}), "vocab": 40}
    return build(model_spec(data)).double().eval()


def _uneven():
    """Layers that differ in shape and in kind."""
    return _model(overrides={"0": {"ffn_width": 8}, "1": {"kv_heads": 1, "placement": "post"}, "2": {"window": 3, "norm": "layernorm"}})


EXTRA = _model(depth=1, ffn_width=24, qk_norm=True).stack.layers[0]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (lambda s: keep(s, [2, 0]), [2, 0]),
        (lambda s: keep(s, []), []),
        (lambda s: insert(s, 0, [EXTRA]), [None, 0, 1, 2, 3]),
        (lambda s: insert(s, 4, [EXTRA, EXTRA]), [0, 1, 2, 3, None, None]),
        (lambda s: insert(s, 1, []), [0, 1, 2, 3]),
        (lambda s: replace(s, 2, EXTRA), [0, 1, None, 3]),
        (lambda s: repeat(s, [3, 3, 1, 0, 3], tie=True), [3, 3, 1, 0, 3]),
    ],
)
def test_surgery_shares_layers_runs_them_in_order_and_its_spec_rebuilds_it(cut, expected):
    model = _uneven()
    before, spec = list(model.stack.layers), model.spec
    stack = cut(model.stack)
    assert list(stack.layers) == [EXTRA if i is None else before[i] for i in expected]
    assert stack.norm is model.stack.norm and stack.training == model.stack.training
    assert list(stack.spec.layers) == [layer.spec for layer in stack.layers]
    made = model.with_stack(stack)
    with torch.device("meta"):
        twin = Model(made.spec)
    assert {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in made.state_dict().items()}
    twin = build(made.spec).double().eval()
    twin.load_state_dict(made.state_dict())
    assert torch.equal(twin({"input_ids": IDS}).logits, made({"input_ids": IDS}).logits)
    h = made.embedding.tokens(IDS)
    for i in expected:
        ctx = Context()
        ctx.begin(h, None)
        h = (EXTRA if i is None else before[i])(h, ctx, (0, 0))
    assert torch.equal(made({"input_ids": IDS}).hidden, made.stack.norm(h))
    assert list(model.stack.layers) == before and model.spec == spec, "the old model is untouched"


def test_tied_repeats_are_one_layer_and_copies_are_their_own():
    stack = _uneven().stack
    tied, copied = repeat(stack, [1, 1, 2], tie=True), repeat(stack, [1, 1, 2])
    assert tied.layers[0] is tied.layers[1] and sum(p.numel() for p in tied.parameters()) < sum(p.numel() for p in copied.parameters())
    assert copied.layers[0] is stack.layers[1] and copied.layers[1] is not stack.layers[1]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert torch.equal(tied(x), copied(x)) and torch.equal(tied(x), stack(x, Context(path=[1, 1, 2])))
    with torch.no_grad():
        copied.layers[1].ffn.branch.down.weight.add_(1)
    assert torch.equal(tied(x), stack(x, Context(path=[1, 1, 2]))) and not torch.equal(tied(x), copied(x))


def test_training_a_cut_trains_the_layers_it_shares():
    model = _uneven()
    cut = model.with_stack(keep(model.stack, [0, 2]))
    cut({"input_ids": IDS}).logits.sum().backward()
    assert [any(p.grad is not None for p in layer.parameters()) for layer in model.stack.layers] == [True, False, True, False]


def test_relative_bias_goes_along():
    model = _model(position="relative")
    cut = model.with_stack(keep(model.stack, [3, 1]))
    assert cut.stack.relative is model.stack.relative
    assert torch.equal(cut({"input_ids": IDS}).logits, model({"input_ids": IDS}, path=[3, 1]).logits)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda s: keep(s, [0, 4]), "layer 4 is out of range: the stack has layers 0 to 3"),
        (lambda s: keep(s, [-1]), "layer -1 is out of range"),
        (lambda s: keep(s, [2, 2]), "each layer once.*repeat"),
        (lambda s: insert(s, 5, [EXTRA]), "cannot insert at 5"),
        (lambda s: insert(s, -1, [EXTRA]), "cannot insert at -1"),
        (lambda s: replace(s, 4, EXTRA), "layer 4 is out of range"),
        (lambda s: repeat(s, [0, 7]), "layer 7 is out of range"),
    ],
)
def test_impossible_surgery_says_why(bad, message):
    with pytest.raises(BadInput, match=message):
        bad(_uneven().stack)


def test_records_equal_a_loop_by_hand():
    model = _uneven()
    seen = record(model, {"input_ids": IDS}, hidden="all", inputs="all", attention="all")
    h = model.embedding.tokens(IDS)
    for i, layer in enumerate(model.stack.layers):
        assert torch.equal(seen.inputs[i], h)
        ctx = Context()
        ctx.begin(h, None)
        read = h if layer.spec.placement == "post" else layer.mixer.norm(h)
        branch = layer.mixer.branch
        mixed = (seen.attention[i] @ branch.v(read).unflatten(-1, (-1, 8)).transpose(1, 2)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(branch.o(mixed), branch(read, ctx, (i, 0)), rtol=1e-11, atol=1e-12)
        h = layer(h, ctx, (i, 0))
        torch.testing.assert_close(seen.hidden[i], h, rtol=1e-11, atol=1e-12)
        h = seen.hidden[i]
    assert torch.equal(seen.output.hidden, model.stack.norm(h))
    stream = seen.stream()
    assert len(stream) == 5 and stream[0] is seen.inputs[0] and stream[-1] is seen.hidden[3]


def test_recording_hidden_states_changes_no_bit_and_keeps_gradients_on_request():
    model = _model()
    plain = model({"input_ids": IDS}).logits
    seen = record(model, {"input_ids": IDS}, hidden=[-1, 0], inputs=[2], gradients=True)
    assert torch.equal(seen.output.logits, plain) and set(seen.hidden) == {0, 3} and set(seen.inputs) == {2}
    grad = torch.autograd.grad(seen.output.logits.sum(), seen.hidden[0])[0]
    assert grad.abs().sum() > 0
    with pytest.raises(BadInput, match="cannot record layer -5: the model has layers 0 to 3"):
        record(model, {"input_ids": IDS}, inputs=[-5])


def test_an_encoder_decoders_records_are_its_decoders_whatever_the_encoders_depth():
    data = preset("encoder-decoder")
    for part, depth in (("stack", 1), ("decoder", 3)):
        data[part] |= {"depth": depth, "width": 16}
        data[part]["layer"] |= {"heads": 2}
    model = build(model_spec(data | {"embedding": {"vocab": 40}})).eval()
    batch = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    seen = record(model, batch, hidden="all", inputs=[-1], attention=[2])
    with torch.no_grad():
        hiddens = model(batch, hiddens=True).hiddens
    assert set(seen.hidden) == {0, 1, 2} and all(torch.equal(seen.hidden[i], hiddens[i]) for i in range(2))
    assert torch.equal(seen.inputs[2], seen.hidden[1]) and seen.attention[2].shape == (2, 2, 5, 5)
    assert torch.equal(model.decoder.norm(seen.hidden[2]), seen.output.hidden)


def _families():
    import transformers as t

    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
    # name: network, its layers, the first part of names of embeddings, of heads
    return {
        "bert": (lambda: t.BertForMaskedLM(t.BertConfig(**small, num_hidden_layers=3)), [f"bert.encoder.layer.{i}" for i in range(3)], ["bert.embeddings"], ["cls.predictions.transform", "cls.predictions.bias"]),
        "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**small, num_hidden_layers=3)), [f"model.layers.{i}" for i in range(3)], ["model.embed_tokens"], ["model.norm", "lm_head"]),
        "gpt2": (lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40)), [f"transformer.h.{i}" for i in range(3)], ["transformer.wte", "transformer.wpe"], ["transformer.ln_f"]),
        "t5": (lambda: t.T5ForConditionalGeneration(t.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40)), [f"{p}.block.{i}" for p in ("encoder", "decoder") for i in range(2)], ["shared"], ["decoder.final_layer_norm"]),
        "vit": (lambda: t.ViTForImageClassification(t.ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4)), 3, ["vit.embeddings"], ["vit.layernorm", "classifier"]),
        "resnet": (lambda: t.ResNetForImageClassification(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 3], layer_type="basic")), [f"resnet.encoder.stages.{s}.layers.{i}" for s, n in ((0, 2), (1, 3)) for i in range(n)], ["resnet.embedder"], ["classifier"]),
        "resnet-bottleneck": (lambda: t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 3, 1], layer_type="bottleneck")), [f"encoder.stages.{s}.layers.{i}" for s, n in ((0, 1), (1, 3), (2, 1)) for i in range(n)], ["embedder"], []),
        "swin": (lambda: t.SwinForImageClassification(t.SwinConfig(embed_dim=8, depths=[2, 2], num_heads=[2, 2], image_size=16, patch_size=2, window_size=2)), [f"swin.encoder.layers.{s}.blocks.{i}" for s in range(2) for i in range(2)], ["swin.embeddings"], ["swin.layernorm", "classifier"]),
        "mixtral": (lambda: t.MixtralForCausalLM(t.MixtralConfig(**small, num_hidden_layers=2, num_local_experts=3, num_key_value_heads=2)), [f"model.layers.{i}" for i in range(2)], ["model.embed_tokens"], ["model.norm", "lm_head"]),
    }  # fmt: skip


class _Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class _SparseBlock(nn.Module):
    """Experts as a list of modules, as older checkpoints have them."""

    def __init__(self):
        super().__init__()
        self.norm, self.router = nn.LayerNorm(4), nn.Linear(4, 3)
        self.experts = nn.ModuleList([_Expert() for _ in range(3)])


class _Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(9, 4), nn.ModuleList([_SparseBlock() for _ in range(2)]), nn.Linear(4, 9)


def _vgg():
    made, inner = [], 3
    for channels, pooled in ((4, False), (4, True), (8, False), (8, True)):
        made += [nn.Conv2d(inner, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()] + [nn.MaxPool2d(2)] * pooled
        inner = channels
    return nn.Sequential(*made, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def _check(network, names, low, high):
    seen = view(network)
    depth = seen.depth
    if isinstance(names, int):
        assert depth == names, seen.names
    else:
        assert list(seen.names) == names
    modules = dict(network.named_modules())
    assert all(layer is modules[name] for layer, name in zip(seen.layers, seen.names, strict=True))
    depths = depth_of(network)
    assert set(depths) == {n for n, _ in network.named_parameters(remove_duplicate=False)}
    for i, layer in enumerate(seen.names):
        assert {d for n, d in depths.items() if n.startswith(layer + ".")} == {i}
    for parts, expected in ((low, -1), (high, depth)):
        for part in parts:
            found = [d for n, d in depths.items() if n.startswith(part)]
            assert found and set(found) == {expected}, part
    return depths


@pytest.mark.parametrize("name", list(_families()))
def test_families_of_transformers(name):
    make, names, low, high = _families()[name]
    _check(make(), names, low, high)


def test_what_stands_between_stages_lies_with_the_stage_below():
    depths = depth_of(_families()["swin"][0]())
    assert {d for n, d in depths.items() if "layers.0.downsample" in n} == {1}
    t5 = depth_of(_families()["t5"][0]())
    assert t5["encoder.final_layer_norm.weight"] == 1 and t5["lm_head.weight"] == t5["shared.weight"] == -1


def test_lists_of_experts_stay_closed():
    _check(_Sparse(), ["blocks.0", "blocks.1"], ["embed"], ["head"])


def test_chains_of_single_operations():
    mlp = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    _check(mlp, ["0", "2", "4"], [], [])
    depths = _check(_vgg(), [str(i) for i in (0, 1, 3, 4, 7, 8, 10, 11, 16)], [], [])
    order = list(dict.fromkeys(depths.values()))
    assert order == list(range(9)), "in order"
    stages = nn.Sequential(*[nn.Sequential(*[nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)]) for _ in range(2)])
    _check(stages, ["0.0", "0.1", "1.0", "1.1"], [], [])
    blocks = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)])
    _check(blocks, ["0", "1", "2"], [], [])
    assert view(nn.Linear(2, 2)).depth == 0 and set(depth_of(nn.Linear(2, 2)).values()) == {-1}


def test_our_own_models_and_bare_stacks():
    _check(_model(depth=3), [f"stack.layers.{i}" for i in range(3)], ["embedding"], ["stack.norm", "head"])
    _check(Stack(StackSpec(2, 8, LayerSpec(heads=2))), ["layers.0", "layers.1"], [], ["norm"])
    model = _model("encoder-decoder", depth=2)
    names = [f"{p}.layers.{i}" for p in ("stack", "decoder") for i in range(2)]
    depths = _check(model, names, ["embedding"], ["decoder.norm"])
    assert depths["stack.norm.weight"] == 1
    tied = _model("bert", depth=2)
    _check(tied, ["stack.layers.0", "stack.layers.1"], ["embedding"], ["head"])
    looped = _model(depth=2)
    looped = looped.with_stack(repeat(looped.stack, [0, 1, 0], tie=True))
    depths = depth_of(looped)
    assert depths["stack.layers.2.ffn.norm.weight"] == depths["stack.layers.0.ffn.norm.weight"] == 0
    assert depths["head.weight"] == 3


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit"])
def test_hidden_states_of_foreign_networks_are_their_own(name):
    torch.manual_seed(0)
    network = _families()[name][0]().eval()
    batch = {"pixel_values": torch.rand(2, 3, 8, 8)} if name == "vit" else {"input_ids": IDS}
    theirs = network(**batch, output_hidden_states=True).hidden_states
    hooks = [len(m._forward_hooks) for m in view(network).layers]
    seen = record(network, batch, hidden="all", inputs="all")
    assert all(torch.equal(seen.inputs[i], theirs[i]) for i in range(3))
    assert torch.equal(seen.hidden[0], theirs[1]) and torch.equal(seen.hidden[1], theirs[2])
    last = {
        "bert": lambda x: x,
        "llama": lambda x: network.model.norm(x),
        "gpt2": lambda x: network.transformer.ln_f(x),
        "vit": lambda x: x,
    }[name]
    assert torch.equal(last(seen.hidden[2]), theirs[3]) or torch.equal(seen.hidden[2], theirs[3])
    assert torch.equal(seen.output.logits, network(**batch).logits)
    assert [len(m._forward_hooks) for m in view(network).layers] == hooks, "no hook is left behind"
    with pytest.raises(BadInput, match="layerwise models only"):
        record(network, batch, attention="all")


def test_no_hook_is_left_when_the_network_fails():
    network = _families()["llama"][0]()
    with pytest.raises(Exception, match=r".+"):
        record(network, {"input_ids": "nonsense"}, hidden="all")
    assert not any(m._forward_hooks for m in view(network).layers)
