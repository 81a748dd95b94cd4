"""Distillation: nothing to learn from oneself, equal to the formula, gradients in the student only, references checked in jobs."""

import pytest
import torch
from torch.nn import functional as F

from layerwise.errors import BadInput
from layerwise.jobs.api import run
from layerwise.models.checkpoint import save
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.objectives.distill import HiddenDistillation, LogitDistillation
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec

IDS = torch.arange(24).view(2, 12) % 20


def _decoder(seed, depth=3, width=16):
    data = preset("decoder") | {"stack": preset("decoder")["stack"] | {"depth": depth, "width": width}, "embedding": {"vocab": 20}}
    return build(model_spec(data), seed)


def _mask():
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return mask


@pytest.mark.parametrize(
    "objective",
    [
        lambda f: HiddenDistillation(teacher=f, pairs={0: 0, -1: -1}),
        lambda f: HiddenDistillation(teacher=f, distance="cosine"),
        lambda f: LogitDistillation(teacher=f, temperature=2.0),
    ],
)
def test_a_model_has_nothing_to_learn_from_itself(objective, tmp_path):
    model = _decoder(0)
    loss = objective(str(save(model, tmp_path / "teacher")))(model, {"input_ids": IDS, "attention_mask": _mask()})
    assert loss.count == 20 and abs(loss.total.item()) < 1e-5


def test_values_are_the_formulas_over_real_positions(tmp_path):
    student, teacher = _decoder(0), _decoder(1, depth=4)
    folder, batch, mask = str(save(teacher, tmp_path / "teacher")), {"input_ids": IDS, "attention_mask": _mask()}, _mask().bool()
    a, b = student(batch, hiddens=True), teacher(batch, hiddens=True)
    hidden = HiddenDistillation(teacher=folder, pairs={0: 1, 2: 3})(student, batch)
    expected = sum(F.mse_loss(a.hiddens[i][mask], b.hiddens[j][mask]) for i, j in ((0, 1), (2, 3))) / 2
    torch.testing.assert_close(hidden.mean, expected)
    logits = LogitDistillation(teacher=folder, temperature=3.0)(student, batch)
    p, q = ((o.logits[mask] / 3).softmax(-1) for o in (b, a))
    torch.testing.assert_close(logits.mean, 9 * (p * (p / q).log()).sum(-1).mean())
    logits.total.backward()
    wanted = torch.autograd.grad(9 * (p.detach() * (p.detach() / q).log()).sum(), student.head.weight)[0]
    torch.testing.assert_close(student.head.weight.grad, wanted, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_other_shapes_are_refused(tmp_path):
    folder = str(save(_decoder(1, width=32), tmp_path / "teacher"))
    with pytest.raises(BadInput, match="width 16, the teacher's 32"):
        HiddenDistillation(teacher=folder)(_decoder(0), {"input_ids": IDS})
    with pytest.raises(BadInput, match="names layer 7"):
        HiddenDistillation(teacher=folder, pairs={7: 0})(_decoder(0), {"input_ids": IDS})


def test_a_student_comes_to_agree_with_its_teacher(text, tmp_path):
    data = preset("decoder") | {
        "stack": {"depth": 2, "width": 16, "layer": preset("decoder")["stack"]["layer"]},
        "embedding": {"vocab": text.vocab},
    }
    teacher, student = build(model_spec(data), 1), build(model_spec(data), 0)
    folder = str(save(teacher, tmp_path / "teacher"))
    spec = TrainSpec("logit-distillation", steps=1, batch=8, options={"teacher": folder})
    batch = text.validation.batch(torch.arange(4))
    objective = LogitDistillation(teacher=folder)
    before = objective(student, batch).mean.item()
    train(student, text, TrainSpec("logit-distillation", steps=40, batch=8, options=spec.options))
    assert objective(student, batch).mean.item() < 0.5 * before


def _job(verses, teacher):
    return {
        "name": "heal",
        "data": {"source": f"path:{verses}", "length": 32, "tokenizer": {"kind": "bytes"}},
        "model": {"preset": "decoder", "stack": {"depth": 3, "width": 16}},
        "stages": {
            "whole": {"train": "causal-lm", "steps": 2, "batch": 4},
            "cut": {"edit": "drop-layers", "layers": [1]},
            "heal": {"train": "hidden-distillation", "steps": 2, "batch": 4, "options": {"teacher": teacher}},
        },
    }


def test_a_job_names_an_earlier_stage_as_teacher(verses, tmp_path):
    run(_job(verses, "stage:whole"), tmp_path / "run")
    run(_job(verses, "stage:whole"), tmp_path / "again")  # from the cache
    assert (tmp_path / "again" / "receipt.json").is_file()
    with pytest.raises(BadInput, match=r"stages.heal: teacher: no earlier stage 'hole' leaves a model. Did you mean 'whole'\?"):
        run(_job(verses, "stage:hole"), tmp_path / "bad")
    with pytest.raises(BadInput, match="there is no folder"):
        run(_job(verses, str(tmp_path / "nothing")), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_another_model_in_the_teachers_folder_is_another_result(verses, tmp_path):
    folder = tmp_path / "teacher"
    job = _job(verses, "stage:whole")
    run(job, tmp_path / "first")
    for seed, out in ((1, "a"), (2, "b")):
        model = build(
            model_spec(
                {**preset("decoder"), "stack": {**preset("decoder")["stack"], "depth": 3, "width": 16}, "embedding": {"vocab": 261}}
            ),
            seed,
        )
        save(model, folder)
        run(_job(verses, str(folder)), tmp_path / out)
    lines = [(tmp_path / out / "events.jsonl").read_text().splitlines() for out in ("a", "b")]
    assert all(not any('"heal"' in line and '"reused": true' in line for line in each) for each in lines)
