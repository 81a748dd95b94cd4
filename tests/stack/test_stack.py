"""Specs, paths, wrappers, surgery, recording, and where the layers of any network are."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layerwise.errors import BadInput
from layerwise.models.model import Model, build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec, spec_data
from layerwise.stack.around import StochasticDepth
from layerwise.stack.context import Context
from layerwise.stack.depth import depth_of, view
from layerwise.stack.record import record
from layerwise.stack.spec import LayerSpec, StackSpec, indices
from layerwise.stack.surgery import insert, keep, repeat, replace

IDS = torch.arange(14).view(2, 7)


def _model(depth=4, **layer):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 16, "init_std": 0.3}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    data["embedding"] = {"vocab": 40}
    return build(model_spec(data)).double().eval()


@given(st.integers(1, 9), st.integers(-9, 9) | st.none(), st.integers(-9, 9) | st.none(), st.sampled_from([None, 1, 2, 3, -1]))
def test_slices_are_pythons_slices(depth, start, stop, step):
    text = f"{'' if start is None else start}:{'' if stop is None else stop}" + ("" if step is None else f":{step}")
    expected = range(depth)[slice(start, stop, step)]
    if any(b is not None and not -depth <= b <= depth for b in (start, stop)) or not expected:
        with pytest.raises(BadInput):
            indices(text, depth)
    else:
        assert indices(text, depth) == expected


@pytest.mark.parametrize("key", ["4", "-5", "a", "", "1:2:0", "5:9", "3:1", "1:2:3:4", "-"])
def test_keys_that_name_no_layer_are_refused(key):
    with pytest.raises(BadInput, match=r"layer|slice"):
        indices(key, 4)


def test_later_overrides_win_and_every_layer_resolves():
    spec = StackSpec(6, 32, LayerSpec(heads=4), {"::2": {"window": 8}, "4": {"window": None, "kv_heads": 2}, "-1": {"ffn": "swiglu"}})
    assert [s.window for s in spec.layers] == [8, None, 8, None, None, None]
    assert [s.kv_heads for s in spec.layers] == [4, 4, 4, 4, 2, 4]
    assert spec.layers[5].ffn_width == 88 and spec.layers[0].ffn_width == 128


def test_spec_round_trips_through_layers_and_json():
    spec = StackSpec(
        5, 32, LayerSpec(heads=4), {"0:2": {"placement": "post"}, "3": {"window": 4, "linears": {"up": {"kind": "lora", "rank": 2}}}}
    )
    assert spec.with_layers(spec.layers).layers == spec.layers
    described = model_spec({"stack": {"depth": 5, "width": 32, "overrides": {"1": {"heads": 2}}}, "embedding": {"vocab": 9}})
    assert model_spec(json.loads(json.dumps(spec_data(described)))) == described


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StackSpec(2, 30, LayerSpec(heads=4)), r"heads \(4\) does not divide width \(30\).*use heads=\d"),
        (lambda: StackSpec(2, 32, LayerSpec(heads=4, kv_heads=3)), "multiple of kv_heads"),
        (lambda: StackSpec(2, 12, LayerSpec(heads=4, position="rotary")), r"even head size"),
        (lambda: StackSpec(2, 32, overrides={"0": {"windw": 3}}), "Did you mean 'window'"),
        (lambda: StackSpec(2, 32, overrides={"0": {"heads": "four"}}), "heads"),
        (lambda: StackSpec(2, 32, LayerSpec(dropout=1.0)), "probability"),
        (lambda: StackSpec(-1, 32), "depth >= 0"),
    ],
)
def test_impossible_stacks_are_refused(make, message):
    with pytest.raises(BadInput, match=message):
        make()


def test_path_runs_these_layers_in_this_order():
    model = _model()
    x = model.embedding({"input_ids": IDS}, torch.arange(7)[None])
    for path in ([0, 1, 1, 3], [3, 2], []):
        h, ctx = x, Context()
        ctx.begin(x, None)
        for i in path:
            h = model.stack.layers[i](h, ctx, (i, 0))
        assert torch.equal(model({"input_ids": IDS}, path=path).hidden, model.stack.norm(h))
    with pytest.raises(BadInput, match="names layer 4"):
        model({"input_ids": IDS}, path=[4])


def test_wrappers_nest_outermost_first_and_an_idle_one_changes_nothing():
    model, calls = _model(), []

    def named(name):
        def around(i, layer, x, ctx, call):
            calls.append((name, i, "in"))
            x = call(x, ctx)
            calls.append((name, i, "out"))
            return x

        return around

    plain = model({"input_ids": IDS}).logits
    assert torch.equal(model({"input_ids": IDS}, around=(named("a"), named("b"))).logits, plain)
    assert calls[:4] == [("a", 0, "in"), ("b", 0, "in"), ("b", 0, "out"), ("a", 0, "out")] and len(calls) == 16


def test_stochastic_depth_skips_whole_samples_and_keeps_the_expectation():
    model = _model(position="none")
    layer = model.stack.layers[0].train()
    x = torch.randn(4000, 1, 16, dtype=torch.float64)
    ctx = Context()
    ctx.begin(x, None)
    full = layer(x, ctx, (0, 0))
    out = StochasticDepth([0.25] * 4)(0, layer, x, ctx, lambda x, ctx: layer(x, ctx, (0, 0)))
    changed = (out != x).any(dim=(1, 2))
    assert changed.double().mean() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close((out - x)[changed], ((full - x) / 0.75)[changed], rtol=1e-9, atol=1e-10)
    assert StochasticDepth([0.25] * 4)(0, layer.eval(), x, ctx, lambda x, ctx: layer(x, ctx, (0, 0))).equal(full)
    assert StochasticDepth([0.0] * 4)(0, layer.train(), x, ctx, lambda x, ctx: layer(x, ctx, (0, 0))).equal(full)


def test_drop_rates_of_the_spec_act_in_training_only():
    model = _model(drop=0.9)
    a, b = model({"input_ids": IDS}).logits, model({"input_ids": IDS}).logits
    assert torch.equal(a, b)
    model.train()
    assert not torch.equal(model({"input_ids": IDS.repeat(8, 1)}).logits[:2], a)


def test_rows_of_a_context_keep_their_masks():
    model = _model()
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])

    def second_row_only(i, layer, x, ctx, call):
        row = torch.tensor([1])
        return x.index_copy(0, row, call(x[row], ctx.rows(row)))

    whole = model({"input_ids": IDS, "attention_mask": mask}).hidden[1, 2:]
    part = model({"input_ids": IDS, "attention_mask": mask}, around=(second_row_only,)).hidden[1, 2:]
    torch.testing.assert_close(whole, part, rtol=1e-12, atol=1e-12)


def test_surgery_shares_layers_and_its_spec_rebuilds_the_shapes():
    model = _model(depth=4)
    stack = model.stack
    extra = _model(depth=1, ffn_width=24).stack.layers[0]
    for made, expected in (
        (keep(stack, [0, 3]), [0, 3]),
        (insert(stack, 2, [extra]), [0, 1, None, 2, 3]),
        (insert(stack, 4, [extra]), [0, 1, 2, 3, None]),
        (replace(stack, 1, extra), [0, None, 2, 3]),
        (repeat(stack, [0, 1, 1, 2], tie=True), [0, 1, 1, 2]),
    ):
        for layer, old in zip(made.layers, expected, strict=True):
            assert layer is (extra if old is None else stack.layers[old])
        cut = model.with_stack(made)
        with torch.device("meta"):
            twin = Model(cut.spec)
        assert {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in cut.state_dict().items()}
    copied = repeat(stack, [0, 1, 1])
    assert copied.layers[1] is stack.layers[1] and copied.layers[2] is not stack.layers[1]
    assert torch.equal(copied.layers[2].ffn.norm.weight, stack.layers[1].ffn.norm.weight)
    assert model.spec.stack.depth == 4
    for bad in (
        lambda: keep(stack, [4]),
        lambda: keep(stack, [1, 1]),
        lambda: insert(stack, 5, [extra]),
        lambda: replace(stack, -1, extra),
    ):
        with pytest.raises(BadInput):
            bad()


def test_record_brings_back_the_stream_and_nothing_else():
    model = _model()
    seen = record(model, {"input_ids": IDS}, hidden="all", inputs=[0, -1])
    hiddens = model({"input_ids": IDS}, hiddens=True).hiddens
    assert all(torch.equal(seen.hidden[i], h) for i, h in enumerate(hiddens)) and len(seen.hidden) == 4
    assert torch.equal(seen.inputs[3], hiddens[2]) and set(seen.inputs) == {0, 3} and not seen.attention
    assert len(seen.stream()) == 5 and not seen.hidden[0].requires_grad
    assert record(model, {"input_ids": IDS}, hidden=[1], gradients=True).hidden[1].requires_grad
    with pytest.raises(BadInput, match="layers 0 to 3"):
        record(model, {"input_ids": IDS}, hidden=[4])


def _foreign():
    import transformers as t

    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
    return {
        "bert": (t.BertModel(t.BertConfig(**small, num_hidden_layers=3)), 3),
        "llama": (t.LlamaForCausalLM(t.LlamaConfig(**small, num_hidden_layers=3)), 3),
        "gpt2": (t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40)), 3),
        "t5": (t.T5ForConditionalGeneration(t.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40)), 4),
        "vit": (t.ViTModel(t.ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4)), 3),
        "resnet": (t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 3], layer_type="basic")), 5),
        "swin": (t.SwinModel(t.SwinConfig(embed_dim=8, depths=[2, 2], num_heads=[2, 2], image_size=16, patch_size=2, window_size=2)), 4),
        "mixtral": (t.MixtralForCausalLM(t.MixtralConfig(**small, num_hidden_layers=2, num_local_experts=3, num_key_value_heads=2)), 2),
        "mlp": (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)), 3),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "vit", "resnet", "swin", "mixtral", "mlp"])
def test_layers_of_foreign_networks(name):
    network, depth = _foreign()[name]
    seen = view(network)
    assert seen.depth == depth, seen.names
    depths = depth_of(network)
    assert set(depths) == {n for n, _ in network.named_parameters(remove_duplicate=False)}
    assert set(range(depth)) <= set(depths.values()) <= set(range(-1, depth + 1))
    for i, layer in enumerate(seen.names):
        assert {d for n, d in depths.items() if n.startswith(layer + ".")} == {i}
    embeddings = [d for n, d in depths.items() if any(k in n for k in ("word_embeddings", "embed_tokens", "wte", "patch_embed"))]
    assert all(d == -1 for d in embeddings)
    tied = {"gpt2", "t5"}
    assert all(d == (-1 if name in tied else depth) for n, d in depths.items() if n.startswith(("lm_head", "pooler")))


def test_foreign_hidden_states_equal_their_own():
    for name in ("bert", "llama"):
        network = _foreign()[name][0].eval()
        theirs = network(input_ids=IDS, output_hidden_states=True).hidden_states
        seen = record(network, {"input_ids": IDS}, hidden="all", inputs=[0])
        assert torch.equal(seen.inputs[0], theirs[0])
        # The last of theirs may have passed the final norm already.
        for i in range(2):
            assert torch.equal(seen.hidden[i], theirs[i + 1])
    with pytest.raises(BadInput, match="layerwise models only"):
        record(network, {"input_ids": IDS}, attention=[0])


def test_depths_of_our_own_models():
    assert view(_model(depth=1)).names == ("stack.layers.0",)
    depths = depth_of(_model(depth=3))
    assert depths["embedding.tokens.weight"] == -1 and depths["stack.layers.2.ffn.norm.weight"] == 2
    assert depths["stack.norm.weight"] == depths["head.weight"] == 3
