"""Block expansion: the papers' maps and beginnings, and that identity changes nothing. Numbers are checks of card 017 (ADEPT) unless said."""

import math

import numpy as np
import pytest
import torch
import transformers

import layerwise as lw
from layerwise.analyze.scores import layer_scores
from layerwise.edit import PREVIEWS
from layerwise.edit.expansion import interleaved
from layerwise.edit.merging.spherical import slerp
from layerwise.errors import BadInput
from layerwise.evaluate.language import language_modeling
from layerwise.models.hf import export_hf, import_hf
from layerwise.nn.cache import Cache
from layerwise.table import lookup

BASE = {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 4}
IDS = {"input_ids": torch.arange(24).reshape(2, 12) * 5 % 50}


def _model(depth=4, vocab=50, **layer):
    model = lw.load("decoder", seed=1, embedding={"vocab": vocab}, stack={"depth": depth, "width": 32, "layer": {**BASE, **layer}})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # weights large enough that every layer matters
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def _values(layer):
    return torch.cat([p.detach().flatten() for p in layer.parameters()])


@pytest.mark.parametrize("placement", ["pre", "lns", "sandwich"])
def test_outputs_stay_to_the_bit_for_every_prefix_and_with_a_cache(placement):
    # 1. Function preservation.
    model = _model(placement=placement)
    grown = lw.edit.expand(model, layers=[0, 2]).eval()
    with torch.no_grad():
        for length in range(1, 13):
            rows = {"input_ids": IDS["input_ids"][:, :length]}
            assert torch.equal(grown(rows).logits, model(rows).logits)
        mine, theirs = Cache(), Cache()
        for ids in IDS["input_ids"].split([5, 1, 4, 2], dim=1):
            assert torch.equal(grown({"input_ids": ids}, cache=mine).logits, model({"input_ids": ids}, cache=theirs).logits)
    assert mine.held((1, 0)) == 12 and mine.bytes * 4 == theirs.bytes * 6


def test_new_layers_stand_directly_behind_their_sources():
    # 7. Expanding {2, 5} of 6 layers gives 0, 1, 2, 2', 3, 4, 5, 5'.
    model = _model(depth=6)
    grown = lw.edit.expand(model, layers=[2, 5], start="copy")
    old = list(model.stack.layers)
    order = [next(i for i, layer in enumerate(old) if torch.equal(_values(layer), _values(made))) for made in grown.stack.layers]
    assert order == [0, 1, 2, 2, 3, 4, 5, 5]
    assert [made is old[i] for made, i in zip(grown.stack.layers, order, strict=True)] == [True] * 3 + [False] + [True] * 3 + [False]
    assert [s.added for s in grown.stack.spec.layers] == [False] * 3 + [True] + [False] * 3 + [True]
    # 4. (a part) copies share no storage with their sources.
    pointers = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() not in pointers for i in (3, 7) for p in grown.stack.layers[i].parameters())


def test_only_output_projections_of_a_fresh_copy_have_gradients():
    # 2. o and down; q, k, v, gate, up and norms have exactly zero. 3. So weight times gradient is zero throughout.
    model = _model()
    grown = lw.edit.expand(model, layers=[1])
    grown(IDS).logits.log_softmax(-1)[..., 7].mean().backward()
    for name, p in grown.stack.layers[2].named_parameters():
        assert bool(p.grad.any()) == name.endswith(("o.weight", "down.weight")), name
        assert not (p * p.grad).any()


def test_no_new_layer_is_the_model_itself():
    # 8. (a part)
    model = _model()
    same = lw.edit.expand(model, count=0)
    assert list(same.stack.layers) == list(model.stack.layers) and same.spec == model.spec


@pytest.mark.parametrize("choose", ["least", "most"])
def test_the_layers_that_matter_least_or_most_by_a_real_skip_are_doubled(choose, text):
    model = _model(vocab=262)
    before = _values(model).clone()
    scores = layer_scores(model, text, "layer-drop", samples=16)
    grown = lw.edit.expand(model, text, count=2, choose=choose, samples=16)
    wanted = sorted(range(4), key=lambda i: scores[i], reverse=choose == "most")[:2]
    behind = [i for i, s in enumerate(grown.stack.spec.layers) if s.added]
    assert sorted(list(model.stack.layers).index(grown.stack.layers[i - 1]) for i in behind) == sorted(wanted)
    # 5. Zeroing all of a layer's tensors is skipping it (pre-norm, no biases); measuring leaves the model as it was.
    assert torch.equal(_values(model), before)
    skipped = [language_modeling(model, text, split="train", path=[i for i in range(4) if i != k]).metrics["val_loss"] for k in range(4)]
    for k, layer in enumerate(model.stack.layers):
        kept = {n: p.detach().clone() for n, p in layer.named_parameters()}
        with torch.no_grad():
            for p in layer.parameters():
                p.zero_()
        assert language_modeling(model, text, split="train").metrics["val_loss"] == skipped[k]
        layer.load_state_dict(kept)


def test_interleaving_follows_the_published_map():
    # Card 041 (DLO), 2: 32 -> 40 inserts after original layers 3, 7, 11, ... of 32.
    assert interleaved(32, 8) == [3, 7, 11, 15, 19, 23, 27, 31]
    assert interleaved(8, 2) == [3, 7] and interleaved(5, 0) == []
    grown = lw.edit.expand(_model(), count=2)
    assert [s.added for s in grown.stack.spec.layers] == [False, False, True, False, False, True]
    with pytest.raises(BadInput, match="equal groups"):
        lw.edit.expand(_model(), count=3)


def test_merged_layers_lie_halfway():
    model = _model(norm="rmsnorm")
    below, here = model.stack.layers[1], model.stack.layers[2]
    linear = lw.edit.expand(model, layers=[2], start="linear").stack.layers[3]
    torch.testing.assert_close(_values(linear), (_values(below) + _values(here)) / 2)
    spherical = dict(lw.edit.expand(model, layers=[2], start="slerp").stack.layers[3].named_parameters())
    for (name, a), (_, b) in zip(here.named_parameters(), below.named_parameters(), strict=True):
        x, y = a.detach().double().numpy().ravel(), b.detach().double().numpy().ravel()
        angle = math.acos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        halfway = (x + y) / 2 if math.cos(angle) > 0.9995 else np.sin(angle / 2) * (x + y) / np.sin(angle)
        np.testing.assert_allclose(spherical[name].detach().numpy().ravel(), halfway, rtol=1e-5, atol=1e-6)
    lowest = lw.edit.expand(model, layers=[0], start="slerp").stack.layers[1]
    assert torch.equal(_values(lowest), _values(model.stack.layers[0]))


def test_slerp_keeps_lengths_between_and_is_linear_where_nearly_parallel():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(slerp(a, b, 1 / 3), torch.tensor([math.cos(math.pi / 6), 0.5]))
    torch.testing.assert_close(slerp(a, torch.tensor([3.0, 1e-5])), torch.tensor([2.0, 5e-6]))
    assert torch.equal(slerp(torch.zeros(3), torch.zeros(3)), torch.zeros(3))


def test_random_layers_are_glorots_and_their_norms_are_one():
    grown = lw.edit.expand(_model(), layers=[1], start="random", seed=4)
    layer = grown.stack.layers[2]
    up = layer.ffn.branch.up.weight
    assert up.std().item() == pytest.approx((2 / sum(up.shape)) ** 0.5, rel=0.05)
    assert torch.equal(layer.ffn.norm.weight, torch.ones(32))
    again = lw.edit.expand(_model(), layers=[1], start="random", seed=4).stack.layers[2]
    assert torch.equal(_values(layer), _values(again))


def test_the_preview_describes_what_is_made_and_impossible_ones_are_refused(tmp_path):
    model = _model()
    for options in ({"layers": [1, 1, 3]}, {"count": 4}, {"count": 2, "start": "random"}):
        made = lw.edit.expand(model, **options)
        assert lookup(PREVIEWS, "expand", "preview")(model.spec, **options) == made.spec
        lw.save(made, tmp_path / "kept")
        assert torch.equal(lw.load(tmp_path / "kept")(IDS).logits, made(IDS).logits)
    for options, match in (
        ({}, "either count or layers"),
        ({"count": 5}, "0 to 4"),
        ({"layers": [4]}, "behind layer 4"),
    ):
        with pytest.raises(BadInput, match=match):
            lw.edit.expand(model, **options)
    with pytest.raises(BadInput, match="silent"):
        lw.edit.expand(_model(placement="post"), count=2)
    odd = lw.load("decoder", embedding={"vocab": 50}, stack={"depth": 2, "width": 32, "overrides": {"1": {"ffn_width": 64}}})
    with pytest.raises(BadInput, match="described differently"):
        lw.edit.expand(odd, layers=[1], start="linear")


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Qwen3"])
def test_other_peoples_decoders_grow_and_go_back(family, tmp_path):
    config = getattr(transformers, f"{family}Config")
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4} if family == "GPT2" else {"hidden_size": 32, "num_hidden_layers": 3}
    sizes |= {} if family == "GPT2" else {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
    torch.manual_seed(0)
    theirs = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config(vocab_size=60, **sizes))
    theirs.save_pretrained(tmp_path / "theirs")
    grown = lw.edit.expand(import_hf(tmp_path / "theirs"), layers=[0, 2])
    export_hf(grown, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert back.config.num_hidden_layers == 5
    with torch.no_grad():
        torch.testing.assert_close(back(**IDS).logits, theirs.eval()(**IDS).logits, rtol=1e-5, atol=1e-5)
