"""Task-aware layer-wise distillation: all checks of card 009 (TED)."""

import pytest
import torch

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.spec import FilterSpec, model_spec
from layerwise.objectives.distances import distances
from layerwise.objectives.distill import Distillation, paired
from layerwise.objectives.divergence import divergence
from layerwise.objectives.filters import FilterTraining
from layerwise.objectives.pairing import layer_pairs
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec

LABELS = torch.tensor([0, 2, 1, 1])


def _vit(seed=0, depth=4, width=16):
    layer = {"heads": 2, "norm": "layernorm", "qkv_bias": True, "ffn_bias": True}
    embedding = {"kind": "patches", "patch": [4, 4], "channels": 1, "size": [8, 8]}
    head = {"kind": "classifier", "classes": 3, "pool": "first"}
    return build(
        model_spec({"embedding": embedding, "stack": {"depth": depth, "width": width, "init_std": 0.2, "layer": layer}, "head": head}), seed
    )


def _text(seed=0, width=16):
    layer = {"heads": 2, "causal": True, "position": "rotary"}
    return build(model_spec({"embedding": {"vocab": 30}, "stack": {"depth": 2, "width": width, "init_std": 0.2, "layer": layer}}), seed)


def _batch():
    return {"pixel_values": torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), "labels": LABELS}


def _ted(teacher, **options):
    return Distillation(None, **{"teacher": teacher, "task": "classification", "hidden": 5.0, "logits": 2.0, **options})


def _gradients(loss, model):
    names = [n for n, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


def test_a_teacher_that_is_the_student_teaches_nothing():
    """Check 1: both terms are 0 and so is their gradient: exactly for hidden states, for logits as far as a softmax sums to 1."""
    model = lw.edit.add_filters(_vit().double(), interval=2, seed=3)
    for options, allowed in (({"logits": 0.0}, 0.0), ({"hidden": 0.0}, 1e-13)):
        model.zero_grad()
        loss = _ted(model, task=None, **options)(model, _batch())
        assert loss.total == 0
        loss.total.backward()
        assert all(p.grad is None or p.grad.abs().max() <= allowed for p in model.parameters())


def test_training_filters_moves_filters_only(digits):
    """Check 2: after some steps every other tensor is bit-identical, and trainable again."""
    model = lw.edit.add_filters(
        lw.load("vit", embedding={"patch": [4, 4], "size": [8, 8], "channels": 1}, stack=_small(), head=_classes()), seed=1
    )
    before = {n: t.clone() for n, t in model.state_dict().items()}
    train(model, digits, TrainSpec("filters", steps=3, batch=8))
    after = model.state_dict()
    assert all(torch.equal(after[n], t) != n.startswith("filters.") for n, t in before.items())
    assert all(p.requires_grad for p in model.parameters())


def _small():
    return {"depth": 2, "width": 16, "layer": {"heads": 2}}


def _classes():
    return {"kind": "classifier", "classes": 10, "pool": "first"}


def test_filters_are_trained_apart():
    """Check 3: filter k and head k get 1/K of the gradient that they get alone."""
    model = lw.edit.add_filters(_vit(), interval=2)
    objective = FilterTraining()
    objective.attach(model, _batch())
    both = _gradients(objective(model, _batch()).total, torch.nn.ModuleList([model.filters, objective.heads]))
    for k, layer in enumerate((1, 3)):
        alone = model.with_stack(model.stack)
        alone.filters = lw.edit.add_filters(_vit(), layers=[layer]).filters
        alone.filters.load_state_dict({n: t for n, t in model.filters.state_dict().items() if f".{layer}." in n})
        single = FilterTraining()
        single.attach(alone, _batch())
        mine = _gradients(single(alone, _batch()).total, torch.nn.ModuleList([alone.filters, single.heads]))
        assert len(mine) == 6, k
        for name, gradient in mine.items():
            torch.testing.assert_close(both[name], gradient / 2)


def test_distilling_reaches_the_students_filters_and_nothing_of_the_teacher():
    """Check 4; the order of the pairs does not matter."""
    teacher, student = (lw.edit.add_filters(_vit(s, width=w), interval=2, size=8, seed=s) for s, w in ((0, 16), (1, 12)))
    loss = _ted(teacher)(student, _batch())
    loss.total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.filters.parameters())
    orders = [{1: 1, 3: 3}, {3: 3, 1: 1}]
    values = [_ted(teacher, pairs=order)(student, _batch()).total for order in orders]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], loss.total)


def test_the_gradient_of_the_logit_term():
    """Check 5: dL/dz = (T / B) (softmax(z_s / T) - softmax(z_t / T))."""
    teacher, student, t = _vit(0), _vit(1), 2.5
    a, b = student(_batch()), teacher(_batch())
    kept = {}

    def scores(output, name):
        made = type(output).logits.fget(output).detach().requires_grad_(name == "student")
        kept[name] = made
        return made

    class Fixed:
        def __init__(self, output, name):
            self.model, self.mask, self.logits = output.model, None, scores(output, name)

    divergence(Fixed(a, "student"), Fixed(b, "teacher"), t).backward()
    expected = t / 4 * ((kept["student"] / t).softmax(-1) - (kept["teacher"] / t).softmax(-1))
    torch.testing.assert_close(kept["student"].grad, expected)


def test_without_hidden_states_it_is_plain_distillation_to_the_bit_and_without_teacher_filters_layer_wise():
    """Check 6."""
    teacher, plain = _vit(0), _vit(1, width=12)
    filtered = lw.edit.add_filters(plain, interval=1, size=16, seed=5)
    with_filters = lw.edit.add_filters(teacher, interval=1, seed=6)
    losses = [_ted(t, hidden=0.0)(s, _batch()).total for t, s in ((teacher, plain), (with_filters, filtered))]
    assert torch.equal(*losses)
    for filters in with_filters.filters.first.values():  # the identity
        torch.nn.init.eye_(filters.weight)
        torch.nn.init.zeros_(filters.bias)
    a, b = (_ted(t, logits=0.0)(filtered, _batch()) for t in (teacher, with_filters))
    torch.testing.assert_close(a.total, b.total)
    ours, theirs = filtered(_batch(), hiddens=True), teacher(_batch(), hiddens=True)
    by_hand = sum((filtered.filters(i, ours.hiddens[i]) - theirs.hiddens[i]).square().mean() for i in range(4)) / 4
    torch.testing.assert_close(a.metrics["distance"] / 4, by_hand.detach())


def test_filters_sit_at_the_end_of_every_interval_and_pair_in_order():
    """Check 7."""
    twelve = _vit(depth=12)
    assert lw.edit.add_filters(twelve, interval=2).filters.layers == (1, 3, 5, 7, 9, 11)
    teacher, student = lw.edit.add_filters(twelve, interval=2), lw.edit.add_filters(_vit(depth=6), interval=1)
    assert layer_pairs(student.spec, teacher.spec, None) == [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11)]
    assert layer_pairs(student.spec, twelve.spec, None) == layer_pairs(student.spec, teacher.spec, None)
    with pytest.raises(BadInput, match="student has 6 and the teacher 12"):
        layer_pairs(student.spec, lw.edit.add_filters(twelve).spec, None)
    with pytest.raises(BadInput, match="must divide the depth"):
        lw.edit.add_filters(twelve, interval=5)
    with pytest.raises(BadInput, match="multiple"):
        layer_pairs(student.spec, _vit(depth=9).spec, None)
    with pytest.raises(BadInput, match="give the student filters of size 16"):
        layer_pairs(_vit(width=12).spec, _vit().spec, "all")


@pytest.mark.parametrize("padding", [False, True])
def test_padding_says_nothing_unless_it_is_asked_to(padding):
    """Check 8: what stands at padded positions does not matter; with `padding`, as in the paper's code, it does."""
    teacher, student = _text(0), lw.edit.add_filters(_text(1, width=8), size=16)
    ids = torch.arange(20).view(2, 10) % 30
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    objective = Distillation(None, teacher=teacher, hidden=1.0, padding=padding)
    other = ids.masked_fill(mask == 0, 7)
    a, b = (objective(student, {"input_ids": i, "attention_mask": mask}).metrics["distance"] for i in (ids, other))
    assert torch.equal(a, b) != padding


def test_filters_change_nothing_and_are_dropped_before_an_export(tmp_path):
    model = lw.load(
        "decoder",
        embedding={"vocab": 30},
        stack={"depth": 2, "width": 16, "layer": {"heads": 2, "causal": True, "position": "rotary", "ffn": "swiglu"}},
    )
    filtered = lw.edit.add_filters(model, size=8, activation="gelu")
    ids = {"input_ids": torch.arange(12).view(1, 12)}
    assert torch.equal(filtered(ids).logits, model(ids).logits)
    assert filtered.filters(0, torch.randn(1, 3, 16)).shape == (1, 3, 8)
    back = lw.load(lw.save(filtered, tmp_path / "own"))
    assert back.spec.filters == FilterSpec((0, 1), 8, "gelu")
    assert all(torch.equal(t, filtered.filters.state_dict()[n]) for n, t in back.filters.state_dict().items())
    with pytest.raises(BadInput, match="drop-filters"):
        lw.export(filtered, tmp_path / "hf", format="hf")
    plain = lw.edit.drop_filters(filtered)
    assert plain.spec == model.spec
    lw.export(plain, tmp_path / "hf", format="hf")


def test_filters_of_a_language_model_learn_its_loss_from_each_layer():
    model, objective = lw.edit.add_filters(_text(), size=16), FilterTraining(task="causal-lm")
    batch = {"input_ids": torch.arange(24).view(2, 12) % 30}
    objective.attach(model, batch)
    loss = objective(model, batch)
    out = model(batch, hiddens=True)
    expected = sum(
        torch.nn.functional.cross_entropy(
            objective.heads[str(i)](model.filters(i, out.hiddens[i]))[:, :-1].flatten(0, 1),
            batch["input_ids"][:, 1:].flatten(),
            reduction="sum",
        )
        for i in (0, 1)
    )
    torch.testing.assert_close(loss.total, expected / 2)
    with pytest.raises(BadInput, match="head of kind classifier"):
        FilterTraining().attach(model, batch)
    with pytest.raises(BadInput, match="add-filters"):
        FilterTraining(task="causal-lm").attach(_text(), batch)


def test_maps_of_convolutions_are_compared_channel_by_channel():
    nets = [
        lw.load(
            "vgg",
            embedding={"channels": 1, "size": [8, 8]},
            stack={"inputs": 1, "layers": [{"channels": 4}, {"channels": 6}]},
            head={"classes": 3},
        )
        for _ in "ab"
    ]
    for p in nets[1].parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    a, b = (net.eval()(_batch(), hiddens=True) for net in nets)
    couples = paired(a, b, "all")
    objective = Distillation(None, teacher=nets[1], hidden=1.0, pairs="all")
    expected = torch.stack([(x - y).square().mean() for x, y in couples]).mean()
    loss = objective(nets[0], _batch())
    torch.testing.assert_close(loss.metrics["distance"] / loss.count, expected.detach())
    cosine = distances("cosine", a.hiddens[0].movedim(1, -1), b.hiddens[0].movedim(1, -1))
    assert cosine.shape == (4, 8, 8)
