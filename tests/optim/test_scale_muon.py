"""Card 004: SCALE's steps against their formulas and its published code's numbers; Muon against PyTorch's."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from layerwise.analyze.ledger import state_bytes, state_floats
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.optim.groups import make_optimizer, set_lr
from layerwise.optim.memory import state_formula, trained_sizes
from layerwise.optim.moments import adam_step
from layerwise.optim.muon import Muon
from layerwise.optim.normalize import normalized, orthogonalized
from layerwise.optim.roles import roles
from layerwise.optim.scale import Scale
from layerwise.optim.spec import OptimizerSpec

LR = 0.1


def _matrix(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _moved(gradients, role="matrix", start=None, **options):
    """How far a parameter of a role has moved, in units of -lr, after steps with these gradients."""
    p = nn.Parameter(torch.zeros_like(gradients[0]) if start is None else start.clone())
    before = p.detach().clone()
    optimizer = Scale([{"params": [p], "role": role}], lr=LR, **options)
    for g in gradients:
        p.grad = g.clone()
        before = p.detach().clone()
        optimizer.step()
    return (before - p.detach()) / LR


def _decoder(tie=False):
    data = preset("decoder") | {"embedding": {"vocab": 50}, "head": {"kind": "lm", "tie": tie}}
    data["stack"] |= {"depth": 2, "width": 16}
    data["stack"]["layer"] |= {"heads": 2}
    return build(model_spec(data))


def test_check_1_rows_have_root_mean_square_one_and_zero_rows_stay():
    g = _matrix(5, 8)
    g[2] = 0
    moved = _moved([g])
    norms = moved.norm(dim=1)
    torch.testing.assert_close(norms[[0, 1, 3, 4]], torch.full((4,), 8**0.5, dtype=torch.float64))
    assert torch.equal(moved[2], torch.zeros(8, dtype=torch.float64))
    assert not _moved([torch.zeros(3, 4)]).any(), "no NaN from nothing"
    torch.testing.assert_close(_moved([_matrix(4, 2, 3, seed=1)]).flatten(1).norm(dim=1), torch.full((4,), 6**0.5, dtype=torch.float64))


def test_check_2_each_rows_scale_is_irrelevant():
    g, c = _matrix(5, 8), torch.tensor([1e-3, 1, 20, 3e4, 0.5], dtype=torch.float64)[:, None]
    torch.testing.assert_close(_moved([g * c]), _moved([g]))
    assert not torch.allclose(_moved([g * c], normalize="none"), _moved([g], normalize="none"))


def test_check_3_an_embedding_is_normalized_over_the_vocabulary_and_absent_tokens_stay():
    g = _matrix(9, 4)
    g[[1, 7]] = 0
    moved = _moved([g], role="embedding")
    torch.testing.assert_close(moved.square().mean(dim=0).sqrt(), torch.ones(4, dtype=torch.float64))
    assert not moved[[1, 7]].any()


@pytest.mark.parametrize("tie", [False, True])
def test_check_4_state_is_the_heads_and_the_vectors(tie):
    model = _decoder(tie)
    spec = OptimizerSpec("scale")
    optimizer = make_optimizer(model, spec)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    head = model.token_matrix if tie else model.head.weight
    vectors = [p for p in model.parameters() if p.dim() < 2]
    expected = head.numel() + 2 * sum(p.numel() for p in vectors)
    assert state_floats(optimizer) == expected == state_formula(spec, trained_sizes(model))
    assert state_bytes(optimizer) == 4 * expected
    assert {id(p) for p, s in optimizer.state.items() if s} == {id(head), *map(id, vectors)}


def test_check_5_without_momentum_the_head_moves_like_the_rest():
    gradients = [_matrix(5, 8, seed=s) for s in range(3)]
    assert torch.equal(_moved(gradients, "head", momentum=0.0), _moved(gradients, "matrix"))


def test_check_6_the_missing_bias_correction_is_irrelevant():
    g1, g2 = _matrix(5, 8), _matrix(5, 8, seed=1)
    torch.testing.assert_close(_moved([g1, g2], "head"), normalized(0.9 * g1 + g2, "column"))
    torch.testing.assert_close(_moved([g1, g2], "head"), normalized(0.09 * g1 + 0.1 * g2, "column"))
    torch.testing.assert_close(_moved([g1, g2], "matrix", momentum_on="all"), normalized(0.9 * g1 + g2, "column"))
    torch.testing.assert_close(_moved([g1, g2], "head", momentum_on="none"), normalized(g2, "column"))


@pytest.mark.parametrize("role", ["matrix", "head", "embedding"])
def test_check_7_weight_decay_is_decoupled(role):
    start = _matrix(5, 8)
    p = nn.Parameter(start.clone())
    p.grad = torch.zeros_like(p)
    Scale([{"params": [p], "role": role}], lr=LR, weight_decay=0.1).step()
    assert torch.equal(p.detach(), start * (1 - LR * 0.1))


def test_check_8_vectors_take_adams_step_at_their_own_rate():
    ours, theirs = (nn.Parameter(torch.ones(6, dtype=torch.float64)) for _ in range(2))
    scale = Scale([ours], lr=1e-3, vector_lr=2e-2, eps=1e-300)
    adam = torch.optim.AdamW([theirs], lr=2e-2, weight_decay=0.0, eps=1e-300)
    for step in range(10):
        for group, peak in ((scale.param_groups[0], 1e-3), (adam.param_groups[0], 2e-2)):
            group["lr"] = peak * (1 - step / 20)
        ours.grad = _matrix(6, seed=step)
        theirs.grad = ours.grad.clone()
        scale.step(), adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_steps_of_the_published_code():
    """Numbers of OptimAI-Lab/Minimalist_LLM_Pretraining at f5bd4e7, scale_optimizer.py: three steps, lr 0.01, adam_lr 0.2, wd 0.1."""
    sides = {"matrix": (3, 4), "embedding": (4, 2), "head": (4, 3), "vector": (3,)}
    parameters = {role: nn.Parameter(torch.linspace(-1, 1, int(torch.tensor(s).prod())).double().view(s)) for role, s in sides.items()}
    optimizer = Scale([{"params": [p], "role": r} for r, p in parameters.items()], lr=0.01, vector_lr=0.2, weight_decay=0.1)
    for step in range(3):
        for p in parameters.values():
            p.grad = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (step + 1) + 0.3).view(p.shape)
        optimizer.step()
    for role, p in parameters.items():
        torch.testing.assert_close(p.detach().flatten()[:3], torch.tensor(GOLDEN[role], dtype=torch.float64), rtol=1e-10, atol=1e-12)


GOLDEN = {
    "matrix": [-1.023040362945, -0.834365759819, -0.632144371257],
    "embedding": [-1.015251819739, -0.730814983291, -0.426415802238],
    "head": [-1.015743820446, -0.859787795218, -0.639982179836],
    "vector": [-1.529271522497, -0.519875218116, 0.801417599049],
}


def test_roles_of_our_models_and_of_others():
    ours = roles(_decoder())
    assert [n for n, r in ours.items() if r == "embedding"] == ["embedding.tokens.weight"]
    assert [n for n, r in ours.items() if r == "head"] == ["head.weight"]
    assert all((r == "vector") == ("norm" in n) for n, r in ours.items())
    assert [n for n, r in roles(_decoder(tie=True)).items() if r == "head"] == ["embedding.tokens.weight"]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    theirs = roles(LlamaForCausalLM(LlamaConfig(**sizes)))
    assert {n: r for n, r in theirs.items() if r in ("head", "embedding")} == {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "head",
    }
    assert [n for n, r in roles(LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))).items() if r == "head"] == [
        "model.embed_tokens.weight"
    ]


def test_total_memory_against_adam_at_the_papers_sizes():
    """Parameters and optimizer state in bf16, README's table: 60M 0.15 of 0.35 GB, 130M 0.32 of 0.81, 350M 0.80 of 2.21, 1B 2.81 of 8.04."""
    sizes = [(512, 1376, 8, 0.15 / 0.35), (768, 2048, 12, 0.32 / 0.81), (1024, 2736, 24, 0.80 / 2.21), (2048, 5461, 24, 2.81 / 8.04)]
    for width, inner, depth, paper in sizes:
        with torch.device("meta"):
            data = preset("decoder") | {"embedding": {"vocab": 32000}}
            data["stack"] |= {"depth": depth, "width": width}
            data["stack"]["layer"] |= {"ffn_width": inner, "heads": 8}
            from layerwise.models.model import Model

            model = Model(model_spec(data))
        numbers = trained_sizes(model)
        whole = sum(numbers.values())
        scale, adam = (whole + state_formula(OptimizerSpec(name), numbers) for name in ("scale", "adam"))
        assert scale / adam == pytest.approx(paper, abs=0.02)
        assert 0.34 < scale / adam < 0.45


def test_normalizations():
    g = _matrix(6, 10)
    torch.testing.assert_close(normalized(g, "row").square().mean(dim=0), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(normalized(g, "column", inputs=0), normalized(g, "row"))
    assert torch.equal(normalized(g, "sign"), g.sign()) and normalized(g, "none") is g
    u, _, v = torch.linalg.svd(g.float(), full_matrices=False)
    values = torch.linalg.svdvals(orthogonalized(g.float()))
    assert ((values > 0.6) & (values < 1.3)).all(), "near one"
    assert (orthogonalized(g.float(), 12) * (u @ v)).sum() / 6 > 0.8, "in the directions of the gradient"
    assert 0.6 < normalized(g, "spectral").square().mean().sqrt() < 1.3


def test_muon_equals_pytorchs():
    start = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = Muon([{"params": [ours], "role": "matrix"}], lr=0.02, weight_decay=0.1)
    peer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        ours.grad = _matrix(6, 10, seed=step).float()
        theirs.grad = ours.grad.clone()
        muon.step(), peer.step()
    # PyTorch's iterates in bfloat16.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * 0.02 * 0.2 * 10**0.5 * 0.03)
    assert (ours - start).norm() > 0.1


def test_muon_gives_adams_step_to_all_but_hidden_matrices_and_keeps_half_the_state():
    model = _decoder()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    spec = OptimizerSpec("muon", lr=0.01)
    optimizer = make_optimizer(model, spec)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    sizes = trained_sizes(model)
    assert state_floats(optimizer) == state_formula(spec, sizes) == sizes["matrix"] + 2 * (sum(sizes.values()) - sizes["matrix"])
    change = before["head.weight"] - model.head.weight.detach()
    torch.testing.assert_close(change, 0.01 * model.head.weight.grad.sign(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["scale", "muon"])
def test_state_survives_a_round_trip(name):
    model = _decoder()
    twin = copy.deepcopy(model)
    optimizers = [make_optimizer(m, OptimizerSpec(name)) for m in (model, twin)]

    def step(net, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        set_lr(optimizer, 0.5)
        optimizer.step()

    step(model, optimizers[0], 0)
    twin.load_state_dict(model.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for net, optimizer in ((model, optimizers[0]), (twin, optimizers[1])):
        step(net, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_adam_steps_of_parameters_with_different_ages():
    a, b = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    state = torch.optim.SGD([a, b], lr=1.0).state
    a.grad = _matrix(3)
    adam_step([a, b], state, 0.1, (0.9, 0.99), 1e-8)
    b.grad = a.grad.clone()
    first = a.detach().clone()
    adam_step([b], state, 0.1, (0.9, 0.99), 1e-8)
    torch.testing.assert_close(b.detach(), first)
    assert state[a]["step"] == state[b]["step"] == 1


def test_bad_options():
    p = [nn.Parameter(torch.zeros(2, 2))]
    for options in ({"momentum": 1.0}, {"momentum_on": "tail"}, {"normalize": "rows"}, {"vector_lr": -1.0}):
        with pytest.raises(BadInput):
            Scale(p, **options)
    with pytest.raises(BadInput):
        Muon(p, steps=0)
