"""Low rank plus entries of what it leaves: the pruning study of card 076 (SLTrain)."""

import pytest
import torch

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.nn.linears.factors import svd_factors
from layerwise.nn.linears.sparse import SparseLowRank
from layerwise.stack.parts_spec import LinearSpec

IDS = {"input_ids": torch.arange(24).view(2, 12) % 64}
SHARE = 0.05


@pytest.fixture(scope="module")
def model():
    return lw.load("decoder", embedding={"vocab": 64}, stack={"depth": 2, "width": 32, "layer": {"heads": 4, "ffn_width": 48}}).eval()


def _sparse(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLowRank)}


def _left(weight, rank=4):
    """What the nearest product of this rank leaves, in the precision that the model has."""
    b, a = svd_factors(weight, rank)
    return (weight.double() - b.double() @ a.double()).detach()


@pytest.mark.parametrize("places", ["largest", "random"])
def test_with_all_of_the_residual_the_matrix_is_what_it_was(model, places):
    whole = lw.edit.factorize(model, rank=4, residual=1.0, places=places)
    assert len(_sparse(whole)) == 14
    for name, module in _sparse(whole).items():
        torch.testing.assert_close(module.materialize(), model.get_submodule(name).weight, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(whole(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("places", ["largest", "random"])
def test_at_the_places_the_matrix_is_the_old_one_and_elsewhere_the_product(model, places):
    for name, module in _sparse(lw.edit.factorize(model, rank=4, residual=SHARE, places=places)).items():
        weight = model.get_submodule(name).weight
        left = _left(weight)
        expected = torch.zeros_like(left).flatten()
        expected[module.places.long()] = left.flatten()[module.places.long()]
        torch.testing.assert_close(module.materialize().double(), weight.double() - left + expected.view_as(left), atol=1e-7, rtol=1e-5)
        assert len(module.places) == int(SHARE * weight.numel()) and (module.places.diff() > 0).all()


def test_the_largest_entries_are_kept_and_leave_the_smallest_error(model):
    """The squared error is the residual's without the squares that are kept, so that no other places leave less."""
    largest, random = (lw.edit.factorize(model, rank=4, residual=SHARE, places=p, seed=1) for p in ("largest", "random"))
    for name, module in _sparse(largest).items():
        weight = model.get_submodule(name).weight.detach()
        squares = _left(weight).square().flatten()
        kept = torch.zeros(len(squares), dtype=torch.bool).index_fill(0, module.places.long(), True)
        assert squares[kept].min() >= squares[~kept].max()
        assert torch.equal(kept.nonzero().flatten(), squares.argsort(descending=True)[: kept.sum()].sort().values)
        errors = [(weight - m.get_submodule(name).materialize()).double().square().sum() for m in (largest, random)]
        torch.testing.assert_close(errors[0], squares[~kept].sum(), rtol=1e-4, atol=1e-9)
        assert errors[0] < errors[1] < squares.sum()


def test_random_places_are_of_the_seed_and_not_of_the_values(model):
    def places(seed, model=model):
        return [m.places for m in _sparse(lw.edit.factorize(model, rank=4, residual=SHARE, places="random", seed=seed)).values()]

    other = lw.load("decoder", embedding={"vocab": 64}, stack={"depth": 2, "width": 32, "layer": {"heads": 4, "ffn_width": 48}}, seed=5)
    assert all(map(torch.equal, places(1), places(1, other))) and not any(map(torch.equal, places(1), places(2)))
    assert len({tuple(p.tolist()) for p in places(1)[:4]}) == 4, "matrices of one size have places of their own"


def test_the_scale_of_the_low_rank_part_is_counted():
    """Factors of s B A with s = alpha / rank = 1/4: the residual is of s B A, and itself not scaled."""
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    linear = SparseLowRank(12, 20, False, LinearSpec("sparse-low-rank", rank=4, alpha=1, density=0.1))
    linear.initialize(0.1, torch.Generator().manual_seed(1))
    with torch.no_grad():
        linear.factor_b.normal_(generator=torch.Generator().manual_seed(2))
    before = 0.25 * linear.factor_b @ linear.factor_a
    linear.take_residual(weight)
    at = linear.places.long()
    torch.testing.assert_close(linear.materialize().flatten()[at], weight.flatten()[at])
    torch.testing.assert_close(linear.values, (weight - before).flatten()[at])


def test_storage_is_packed_in_memory_and_on_disk_and_merging_multiplies_out(model, tmp_path):
    thin = lw.edit.factorize(model, rank=4, residual=SHARE)
    for module in _sparse(thin).values():
        outer, inner = module.out_features, module.in_features
        assert module.bytes == 4 * 4 * (outer + inner) + 8 * int(SHARE * outer * inner)
    lw.save(thin, tmp_path / "m")
    back = lw.load(tmp_path / "m").eval()
    assert torch.equal(back(IDS).logits, thin(IDS).logits)
    merged = lw.edit.merge(thin)
    assert merged.spec.stack.layers == model.spec.stack.layers
    for name, module in _sparse(thin).items():
        assert torch.equal(merged.get_submodule(name).weight, module.materialize())
    torch.testing.assert_close(merged(IDS).logits, thin(IDS).logits, atol=1e-5, rtol=1e-4)


def test_a_decoder_of_hugging_face_keeps_its_outliers(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        theirs.model.layers[0].mlp.up_proj.weight.fill_diagonal_(-0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    thin = lw.edit.factorize(lw.load(tmp_path / "theirs"), rank=2, residual=1 / 64).eval()
    up = thin.stack.layers[0].ffn.branch.up
    assert torch.equal(up.places, 33 * torch.arange(32, dtype=torch.int32))
    torch.testing.assert_close(up.materialize().diag(), torch.full((32,), -0.5))
    lw.export(lw.edit.merge(thin), tmp_path / "out", format="hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(back(**IDS).logits, thin(IDS).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("share", "said"), [(0.0, r"in \(0, 1\]"), (1.5, r"in \(0, 1\]"), (1e-6, "keeps no entry of q, 32 x 32")])
def test_shares_that_keep_nothing_are_refused(model, share, said):
    with pytest.raises(BadInput, match=said):
        lw.edit.factorize(model, rank=4, residual=share)
