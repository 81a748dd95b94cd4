"""Plans for encoders: what is kept of masked-LM models and of models of sentence vectors, the table of tokens, and whole plans."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

import layerwise as lw
from layerwise.cli import app
from layerwise.data.masking import mask_tokens
from layerwise.edit.quantization.engine import calibration_rows
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference
from layerwise.evaluate.language import masked_language_modeling
from layerwise.plan.choice import FAMILIES, Choice, How, applied, previewed, stages
from layerwise.plan.damage import NONE, Damage, Probe, damages
from layerwise.plan.measure import check_measurable, measure_for
from layerwise.plan.search import Candidate, Space
from layerwise.plan.size import LayerBytes, model_bytes
from layerwise.stack.surgery import keep, replace

HOW = How(samples=4, batch=4, group=8)
LEVELS: dict[str, Any] = {"drop": (True,), "ffn": (0.5,), "bits": (4, 2), "tokens": (8, 2)}
MOVES = [Choice(drop=True), Choice(ffn=0.5), Choice(bits=2)]


def encoder(seed: int = 0, depth: int = 3, **more: Any) -> Any:
    stack = {"depth": depth, "width": 32, "layer": {"heads": 4, "ffn_width": 64}, "init_std": 0.1}
    return lw.load("bert", seed=seed, embedding={"vocab": 262, "max_length": 64}, stack=stack, **more).eval()


def changed(model: Any, i: int, layer: Any) -> Any:
    """The model with another layer i, or without it."""
    if layer is None:
        return model.with_stack(keep(model.stack, [j for j in range(model.stack.depth) if j != i]))
    return model.with_stack(replace(model.stack, i, layer))


def test_damages_of_masked_language_models_are_those_at_masked_positions(text: Any) -> None:
    model, how = encoder(), How(samples=4, batch=4, group=8, objective="masked-lm")
    make = lambda plan: applied(model, text, stages(plan, how), 0)  # noqa: E731
    found = damages(Probe(model, text, measure_for(model, text, ""), samples=8, batch=4, seed=1), MOVES, make)
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([i for i in (text.pad_id, text.eos_id, text.cls_id, text.sep_id) if i is not None])
    masked = [
        mask_tokens(r["input_ids"], rate=0.15, mask_id=text.mask_id, vocab=text.vocab, special_ids=special, generator=generator)
        for r in calibration_rows(text, 8, 4, "train", 1, 1, model.device)
    ]

    def scores(one: Any) -> torch.Tensor:
        with inference(one):
            return torch.cat([one({"input_ids": ids}).logits[labels != -100].log_softmax(-1) for ids, labels in masked])

    labels = torch.cat([labels[labels != -100] for _, labels in masked])
    whole = scores(model)
    for move, i in itertools.product(MOVES, range(3)):
        made = scores(changed(model, i, None if move.drop else make((move,) * 3).stack.layers[i]))
        added = F.nll_loss(made, labels) - F.nll_loss(whole, labels)
        assert found[move][i].added == pytest.approx(float(added), abs=1e-5)
        assert found[move][i].divergence == pytest.approx(float((whole.exp() * (whole - made)).sum(-1).mean()), abs=1e-5)


def test_what_plans_of_masked_language_models_are_judged_by_is_the_evaluation_of_that_name(text: Any) -> None:
    model = encoder()
    targets = list(measure_for(model, text, "").targets(batches(text.validation, 4, 5)))
    with inference(model):
        loss = sum(t.loss(model(t.rows)) for t in targets) / sum(t.count for t in targets)
    assert loss == pytest.approx(masked_language_modeling(model, text, batch=4, batches_at_most=5).metrics["val_loss"])


def test_damages_of_encoders_without_a_head_turn_the_vectors_of_texts(text: Any) -> None:
    model, how = encoder(head=None), How(samples=4, batch=4, group=8, by="activation")
    make = lambda plan: applied(model, text, stages(plan, how), 0)  # noqa: E731
    probe = Probe(model, text, measure_for(model, text, ""), samples=8, batch=4, seed=1)
    found = damages(probe, [*MOVES, Choice(tokens=2)], make)
    rows = torch.cat([r["input_ids"] for r in calibration_rows(text, 8, 4, "train", 1, 1, model.device)])

    def turned(one: Any) -> float:
        with inference(one), inference(model):
            a, b = (m({"input_ids": rows}).hidden.mean(dim=1) for m in (one, model))
        return float((1 - F.cosine_similarity(a, b)).mean())

    assert probe.loss == pytest.approx(0, abs=1e-6)
    for move, i in itertools.product(MOVES, range(3)):
        away = turned(changed(model, i, None if move.drop else make((move,) * 3).stack.layers[i]))
        assert found[move][i] == Damage(pytest.approx(away, abs=1e-5), pytest.approx(away, abs=1e-5))
        assert found[move][3] == NONE
    table = turned(applied(model, text, {"t": {"edit": "quantize-embedding", "bits": 2, "group": 8}}, 0))
    assert found[Choice(tokens=2)][:3] == [NONE] * 3 and found[Choice(tokens=2)][3].added == pytest.approx(table, abs=1e-5) != 0


@pytest.mark.parametrize("pool", ["first", "max"])
def test_vectors_are_those_that_the_model_pools(pool: str, text: Any) -> None:
    model = encoder(head=None, pool=pool)
    other = applied(model, text, {"drop": {"edit": "drop-layers", "layers": [1]}}, 0)
    (target, *_) = measure_for(model, text, "").targets(batches(text.validation, 4, 1))
    with inference(model), inference(other):
        a, b = ({"first": h[:, 0], "max": h.amax(dim=1)}[pool] for h in (m(target.rows).hidden for m in (model, other)))
        assert target.loss(other(target.rows)) == pytest.approx(float((1 - F.cosine_similarity(b, a)).sum()), abs=1e-5)


def test_a_model_whose_pooling_is_not_known_is_refused(text: Any, tmp_path: Path) -> None:
    lw.save(encoder(head=None, pool=None), tmp_path / "model", tokenizer=text.tokenizer)
    told = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), "--out", str(tmp_path / "plan")])
    assert told.exit_code == 2 and "1_Pooling" in told.output and not (tmp_path / "plan").exists()
    with pytest.raises(BadInput, match="1_Pooling"):  # before anything is measured
        check_measurable(encoder(head=None, pool=None).spec)


def test_the_table_of_tokens_is_a_place_of_its_own_and_what_trying_all_plans_finds_is_found() -> None:
    spec = encoder(head=None).spec
    space = Space(spec, LayerBytes(torch.float32), LEVELS, HOW)
    generator = random.Random(0)
    moves = [Choice(**{n: level}) for n, levels in LEVELS.items() for level in levels]
    space.expect({m: [Damage(0, generator.random() * ((m.tokens is not None) == (i == 3))) for i in range(4)] for m in moves})
    layers, tables = ([k for k, o in enumerate(space.options) if (o.tokens is not None) == t] for t in (False, True))
    for families in (list(FAMILIES), ["bits", "tokens"], ["drop", "tokens"], ["drop"]):
        within = [[k for k in ks if set(space.options[k].families) <= set(families)] for ks in (layers, layers, layers, tables)]
        every = [space.candidate(ks, "") for ks in itertools.product(*within)]
        every = [c for c in every if not all(choice.drop for choice in c.plan[:3])]
        assert all(c.bytes == model_bytes(previewed(spec, stages(c.plan, HOW)), torch.float32) for c in every[:: len(every) // 7])
        assert space.smallest(families) == min(c.bytes for c in every)
        sizes = sorted(c.bytes for c in every)
        for budget in (sizes[0], sizes[len(sizes) // 3]):
            chosen = space.best(families, budget)
            assert space.candidate(chosen or [], "").predicted == pytest.approx(min(c.predicted for c in every if c.bytes <= budget))
    alike = space.uniform(["bits"], model_bytes(spec, torch.float32) // 4)
    assert alike is not None and len({space.options[k] for k in alike[:3]}) == 1
    assert space.candidate(alike, "").bytes <= model_bytes(spec, torch.float32) // 4
    assert [space.options[k] for k in space.as_is] == [Choice()] * 3 + [Choice(tokens=16)] and space.candidate(
        space.as_is, ""
    ).families == ()


def test_rounding_the_table_beside_a_method_makes_no_combination_of_it() -> None:
    assert not Candidate((Choice(bits=2), Choice(tokens=8)), 0, {}).mixed
    assert Candidate((Choice(bits=2, ffn=0.5), Choice(tokens=8)), 0, {}).mixed


PROSE = "\n\n".join(
    f"On day {i} the fox meets the {w} by the wall, and the wall lets it pass." * 8 for i in range(30) for w in ("crow", "tide")
)


@pytest.mark.parametrize("kind", ["masked tokens", "sentence vectors"])
def test_a_plan_for_an_encoder_is_a_job_that_makes_the_model_that_was_measured(
    kind: str, text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.jobs.planning.LEVELS", {**LEVELS, "heads": (0.5,), "rank": (0.5,)})
    (tmp_path / "prose.txt").write_text(PROSE)
    model = encoder(depth=2, **({} if kind == "masked tokens" else {"head": None}))
    lw.save(model, tmp_path / "model", tokenizer=text.tokenizer)
    options = [
        "--rows",
        "16",
        "--samples",
        "8",
        "--tries",
        "2",
        "--length",
        "24",
        "--group",
        "8",
        "--target-size",
        "0.6",
        "--heal",
        "1",
        "--json",
    ]
    given = ["plan", tmp_path / "model", "--data", f"path:{tmp_path / 'prose.txt'}", *options]
    told = CliRunner().invoke(app, [str(a) for a in (*given, "--out", tmp_path / "plan", "--apply", tmp_path / "made")])
    assert told.exit_code == 0, told.output
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert found["measure"]["name"] == kind and (found["held_out"] == pytest.approx(0, abs=1e-6)) == (kind == "sentence vectors")
    (target,) = found["targets"]
    assert all(c["bytes"] <= target["budget"] for c in target["methods"].values() if c is not None)
    assert target["methods"]["low rank"] is not None or kind == "masked tokens"
    assert (len(target["plan"]["layers"]) == 3) == (kind == "sentence vectors")  # a place for the table
    job = yaml.safe_load((tmp_path / "plan" / "plan.yaml").read_text())
    assert job["stages"]["after"]["evaluate"] == {"masked tokens": "masked-lm", "sentence vectors": "embedding-agreement"}[kind]
    ran = CliRunner().invoke(app, ["run", str(tmp_path / "plan" / "plan.yaml"), "--out", str(tmp_path / "run"), "--quiet"])
    assert ran.exit_code == 0, ran.output
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "made", tmp_path / "run" / "models" / "default" / "seed-0"))
    assert ours.keys() == theirs.keys() and all(bool((ours[n] == theirs[n]).all()) for n in ours)
    assert target["plan"]["bytes"] == sum(t.numel() * t.element_size() for t in ours.values())


def test_an_encoder_decodes_nothing(text: Any, tmp_path: Path) -> None:
    lw.save(encoder(head=None), tmp_path / "model", tokenizer=text.tokenizer)
    told = CliRunner().invoke(app, ["plan", str(tmp_path / "model"), "--target-latency", "5", "--out", str(tmp_path / "plan")])
    assert told.exit_code == 2 and "--latency-of prefill" in told.output and not (tmp_path / "plan").exists()
