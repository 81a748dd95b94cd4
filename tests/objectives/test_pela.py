"""Factors healed by a teacher's features and kept near its matrices: the checks of card 081 (PELA) that are about losses."""

import pytest
import torch

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.spec import model_spec
from layerwise.nn.linears.lowrank import LowRank
from layerwise.objectives.distill import Distillation
from layerwise.objectives.nearness import factored, nearness

LABELS = torch.tensor([0, 2, 1])


def _vit(seed=0, dropout=0.0):
    layer = {"heads": 2, "norm": "layernorm", "qkv_bias": True, "out_bias": True, "ffn_bias": True, "dropout": dropout}
    return build(
        model_spec(
            {
                "embedding": {"kind": "patches", "patch": [4, 4], "channels": 1, "size": [8, 8]},
                "stack": {"depth": 3, "width": 16, "init_std": 0.2, "layer": layer},
                "head": {"kind": "classifier", "classes": 3, "pool": "first"},
            }
        ),
        seed,
    )


def _batch(rows=3):
    pixels = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": LABELS.repeat(rows // 3)}


def _pela(teacher, **options):
    return Distillation(None, **{"teacher": teacher, "task": "classification", "hidden": 1.0, "pairs": "all", "near": 1.0, **options})


def test_a_student_of_full_rank_has_no_feature_loss_and_the_radius_squared_as_penalty():
    """Check 4: L_feat = 0, L_pert = eps^2 (up to rounding of the factors)."""
    teacher = _vit().double()
    student = lw.edit.factorize(teacher, rank=10**6)
    loss = _pela(teacher, radius=0.5)(student, _batch())
    assert loss.metrics["distance"] / loss.count < 1e-20
    torch.testing.assert_close(loss.metrics["nearness"] / loss.count, torch.tensor(0.25, dtype=torch.float64), rtol=1e-10, atol=0)
    expected = loss.metrics["task_loss"] + 3 * 0.25
    torch.testing.assert_close(loss.total.detach(), expected, rtol=1e-9, atol=1e-9)


def test_the_penalty_reaches_factors_only_at_one_entry_of_each_product():
    """Check 4: dL_pert / dW' is not zero at the entry that changed most, and nowhere else."""
    teacher, model = _vit(), lw.edit.factorize(_vit(), rank=4, roles=["q", "down"])
    nearness(factored(model, teacher), 0.0).backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {n for n, _ in model.named_parameters() if "factor_" in n}
    linear = next(m for m in model.modules() if isinstance(m, LowRank))
    product = linear.materialize().detach().requires_grad_()
    linear.materialize = lambda: product
    weight = teacher.get_submodule("stack.layers.0.mixer.branch.q").weight
    nearness([(linear, weight)], 0.0).backward()
    assert product.grad.count_nonzero() == 1
    assert product.grad.abs().argmax() == (product - weight).abs().argmax()


def test_the_penalty_is_zero_at_the_radius_only_and_a_hinge_is_zero_below_it_too():
    """Check 5; and the norm is the largest entry, not the largest row sum."""
    teacher, model = _vit(), _vit()
    model = lw.edit.factorize(model, rank=16, roles=["q"])
    pairs = factored(model, teacher)[:1]
    linear, weight = pairs[0]
    with torch.no_grad():  # a change of 0.1 in three entries of a row, so that row sums differ from entries
        linear.factor_a.copy_(torch.eye(16))
        linear.factor_b.copy_(weight)
        linear.factor_b[2, :3] += 0.1
    values = {(r, h): nearness(pairs, r, hinge=h).item() for r in (0.05, 0.1, 0.2) for h in (False, True)}
    assert values[0.1, False] < 1e-10 and values[0.05, False] == pytest.approx(0.0025, rel=1e-3)
    assert values[0.2, False] == pytest.approx(0.01, rel=1e-3) and values[0.2, True] == 0
    nearness(pairs, 0.2).backward()
    assert linear.factor_b.grad[2, :3].sum() < 0  # descent makes the change larger


def test_features_are_compared_by_element_and_the_teacher_only_looks_on():
    """Check 6: the loss of a doubled batch is the same; the teacher runs once, in evaluation mode, and gets no gradient."""
    teacher, student = _vit(1, dropout=0.5).train(), lw.edit.factorize(_vit(1), ratio=2.0)
    objective, runs = _pela(teacher, near=0.0), []
    teacher.stack.layers[0].register_forward_hook(lambda module, given, made: runs.append(module.training))
    one, two = objective(student, _batch()), objective(student, {n: torch.cat([t, t]) for n, t in _batch().items()})
    torch.testing.assert_close(two.metrics["distance"] / two.count, one.metrics["distance"] / one.count)
    assert runs == [False, False]
    one.total.backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.stack.layers[0].ffn.branch.up.factor_a.grad is not None
    a, b = student(_batch(), hiddens=True).hiddens, teacher.eval()(_batch(), hiddens=True).hiddens
    expected = sum((x - y).square().mean() for x, y in zip(a, b, strict=True)) / 3
    torch.testing.assert_close((one.metrics["distance"] / one.count), expected.detach())


def test_what_cannot_be_kept_near_is_refused():
    with pytest.raises(BadInput, match="this model has none"):
        _pela(_vit())(_vit(), _batch())
    with pytest.raises(BadInput, match="dense matrix of that name"):
        thin = lw.edit.factorize(_vit(), ratio=2.0)
        _pela(thin)(thin, _batch())
    with pytest.raises(BadInput, match="one of them or a task"):
        Distillation(None, teacher=_vit())


def test_any_decoder_of_text_can_be_healed_so(tmp_path):
    """The same objective on a Llama of transformers: a few steps bring the compressed model's hidden states nearer."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    teacher = lw.load(tmp_path)
    student = lw.edit.factorize(teacher, ratio=2.0)
    batch = {"input_ids": torch.arange(32).view(2, 16) % 40}
    objective = Distillation(None, teacher=str(tmp_path), hidden=1.0, pairs="all", logits=1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    seen = []
    for _ in range(12):
        loss = objective(student, batch)
        seen.append(float(loss.metrics["distance"]))
        optimizer.zero_grad()
        loss.mean.backward()
        optimizer.step()
    assert seen[-1] < 0.7 * seen[0]
