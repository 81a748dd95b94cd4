"""Routers attached, trained, set to a share, taken off: the checks of card 117 that concern training, and what goes out."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

import layerwise as lw
from layerwise.data.load import load_data
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.errors import BadInput
from layerwise.evaluate.continuation import continuation, jaccard_distance, left_padded
from layerwise.infer.generate import generate
from layerwise.infer.routes import decisions
from layerwise.models.hf import export_hf, import_hf
from layerwise.models.model import build, rebuilt
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.sequence_router import GATING, Gating
from layerwise.objectives.language import CausalLM
from layerwise.objectives.routing import RouterLM, running
from layerwise.optim.spec import OptimizerSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec

DEPTH = 5


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    words = ["red", "green", "blue", "black", "white", "grey", "pink"]
    rows = [{"a": f"{x} and {y}", "b": f"{y} or {x}"} for x in words for y in words]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    spec = DataSpec(
        source=f"path:{folder / 'rows.jsonl'}",
        pairs={"turn": ("a", "b"), "copy": ("a", "a")},
        tokenizer=TokenizerSpec("bytes"),
        length=48,
        validation=0.3,
    )
    return load_data(spec)


def _base(vocab=262, **layer):
    data = preset("decoder")
    data["stack"] |= {"depth": DEPTH, "width": 32, "init_std": 0.15}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    data["embedding"] = {"vocab": vocab}
    return build(model_spec(data), 1).eval()


def _scattered(model, seed=5, scale=0.5):
    """The routed model with routers that decide differently from prompt to prompt."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.stack.layers:
        if layer.router is not None:
            torch.nn.init.normal_(layer.router.weight, std=scale, generator=generator)
    return model


def _train(model, pairs, objective, **options):
    spec = TrainSpec(
        objective=objective, options=options, steps=3, batch=8, optimizer=OptimizerSpec(lr=0.05, weight_decay=0.1), val_every=3
    )
    train(model, pairs, spec)
    return model


def _moved(before, model):
    return {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}


@pytest.mark.parametrize("gate", ["soft", "straight-through"])
def test_the_first_phase_moves_routers_and_the_second_low_rank_terms(pairs, gate):  # check 3
    model = lw.edit.route_layers(_base(), bias=0.3)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    _train(model, pairs, "router-lm", gate=gate)
    assert _moved(before, model) == {f"stack.layers.{i}.router.{what}" for i in (1, 2, 3) for what in ("weight", "bias")}
    assert all(p.requires_grad for p in model.parameters())
    model = lw.edit.calibrate_routes(_scattered(model), pairs, skip=0.3)
    adapted = lw.edit.lora(model, rank=2, targets=["q", "v", "down"])
    batch = pairs.train.batch(torch.arange(8))
    assert torch.equal(adapted(batch).logits, model(batch).logits)  # B = 0
    before = {n: t.clone() for n, t in adapted.state_dict().items()}
    _train(adapted, pairs, "causal-lm")
    moved = _moved(before, adapted)
    assert moved and all(".lora_" in name for name in moved)
    assert torch.equal(decisions(adapted, batch)[:, :2], decisions(model, batch)[:, :2])  # below what any term can change


def test_the_loss_is_the_papers(pairs):  # check 7
    model = _scattered(lw.edit.route_layers(_base(), layers=[":"]))
    batch = pairs.train.batch(torch.arange(6))
    soft = {GATING: Gating("soft")}
    plain = CausalLM()(model, batch, extras=soft)
    assert torch.equal(RouterLM(skipping=0.0, decay=0.0)(model, batch).mean, plain.mean)
    gating = Gating("soft")
    model(batch, extras={GATING: gating})
    for rho in gating.rho.values():
        rho.retain_grad()
    penalty = running(gating, batch)
    penalty.backward()
    real = batch["attention_mask"].bool()
    assert penalty.item() == pytest.approx(sum(rho[real].mean().item() for rho in gating.rho.values()), rel=1e-5)
    top = gating.rho[DEPTH - 1].grad  # no other rho depends on this one
    torch.testing.assert_close(top, real.float() / real.sum())
    squares = sum(p.square().sum().item() for layer in model.stack.layers for p in layer.router.parameters())
    made = RouterLM(skipping=0.2, decay=0.01)(model, batch)
    assert made.mean.item() == pytest.approx(plain.mean.item() + 0.2 * penalty.item() + 0.01 * squares, rel=1e-5)
    with torch.no_grad():  # validation is of the layers that run, hard
        assert torch.equal(RouterLM(skipping=0.2)(model, batch).total, CausalLM()(model, batch).total)


def test_the_threshold_is_set_for_a_share_and_what_cannot_be_is_refused(pairs):
    model = _scattered(lw.edit.route_layers(_base(), bias=0.0))
    for skip in (0.2, 0.5):
        set_ = lw.edit.calibrate_routes(model, pairs, skip=skip, samples=1000)
        share = 1 - decisions(set_, pairs.train.batch(torch.arange(len(pairs.train)))).float().mean().item()
        assert share == pytest.approx(skip, abs=0.02)
    with pytest.raises(BadInput, match=r"0 to 0\.6 where 3 of 5 have a router; it is 0\.7"):
        lw.edit.calibrate_routes(model, pairs, skip=0.7)
    with pytest.raises(BadInput, match="attach them first"):
        lw.edit.calibrate_routes(_base(), pairs, skip=0.1)
    with pytest.raises(BadInput, match="has routers already"):
        lw.edit.route_layers(model)
    with pytest.raises(BadInput, match="router-lm needs a model with routers"):
        _train(_base(), pairs, "router-lm")
    with pytest.raises(BadInput, match="encoder-decoder"):
        lw.edit.route_layers(lw.load("encoder-decoder", embedding={"vocab": 40}))


def test_a_set_that_all_prompts_agree_on_goes_out_as_a_plain_model_and_others_are_refused(pairs, tmp_path):
    base = lw.edit.lora(_base(), rank=2)
    for layer in base.stack.layers:
        torch.nn.init.normal_(layer.ffn.branch.down.lora_b, std=0.3)
    model = lw.edit.route_layers(base, layers=[":"], bias=1.0)
    batch = pairs.train.batch(torch.arange(8))
    with pytest.raises(BadInput, match="layer 0 has a router, and no family runs a layer for some prompts"):
        export_hf(model, tmp_path / "no")
    for i in (1, 3):
        torch.nn.init.constant_(model.stack.layers[i].router.bias, -1.0)
    plain = lw.edit.merge_lora(lw.edit.settle_routes(model, pairs))
    assert plain.stack.depth == 3 and plain.spec.stack.layers[0].router is None
    torch.testing.assert_close(plain(batch).logits, model(batch).logits, rtol=1e-4, atol=1e-5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export_hf(plain, tmp_path / "hf")).eval()
    ids = batch["input_ids"][:, :6]
    torch.testing.assert_close(theirs(ids).logits, model({"input_ids": ids}).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(BadInput, match=r"of \d+ prompts run layer \d and the others skip it"):
        lw.edit.settle_routes(lw.edit.calibrate_routes(_scattered(model), pairs, skip=0.3), pairs)
    with pytest.raises(BadInput, match="with full_prefill every layer reads the prompt"):
        lw.edit.settle_routes(lw.edit.route_layers(base, full_prefill=True), pairs)


@pytest.mark.parametrize("make", [transformers.GPT2Config, transformers.LlamaConfig], ids=["gpt2", "llama"])
def test_a_transformers_decoder_is_routed_and_goes_back(make, tmp_path, pairs):
    names = {"n_layer": 4, "n_head": 2, "n_embd": 32, "n_positions": 64} if make is transformers.GPT2Config else None
    sizes = names or {
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_key_value_heads": 1,
    }
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(make(vocab_size=262, **sizes)).eval()
    theirs.save_pretrained(tmp_path / "in")
    model = lw.edit.route_layers(import_hf(tmp_path / "in"), bias=-1.0, layers=[1, 2])
    ids = pairs.train.batch(torch.arange(3))["input_ids"][:, :8]
    cut = lw.edit.drop_layers(import_hf(tmp_path / "in"), layers=[1, 2])
    assert torch.equal(generate(model, ids, new=6), generate(cut, ids, new=6))
    back = transformers.AutoModelForCausalLM.from_pretrained(export_hf(lw.edit.settle_routes(model, pairs), tmp_path / "out")).eval()
    torch.testing.assert_close(back(ids).logits, model({"input_ids": ids}).logits, rtol=1e-4, atol=1e-5)


def test_continuation_measures_what_is_said(pairs):
    model = _scattered(lw.edit.route_layers(_base(), bias=0.0))
    found = continuation(model, pairs, batch=7)
    every = pairs.validation.batch(torch.arange(len(pairs.validation)))
    runs = decisions(model, every)
    assert found.metrics["layers_run"] == pytest.approx(runs.sum(dim=1).float().mean().item())
    skips = [1 - runs[every["tasks"] == task].float().mean(dim=0) for task in (0, 1)]
    assert found.metrics["task_distance"] == pytest.approx(jaccard_distance(*skips), abs=1e-6)
    loss = CausalLM()(model, every)
    assert found.metrics["val_loss"] == pytest.approx(loss.mean.item(), rel=1e-5)
    assert found.metrics["bleu"] == pytest.approx((found.metrics["turn_bleu"] + found.metrics["copy_bleu"]) / 2)


def test_every_prompt_skips_the_layers_its_routers_give_least(pairs):
    model = _scattered(lw.edit.route_layers(_base(), bias=0.0, layers=["1:"]))
    every = pairs.validation.batch(torch.arange(len(pairs.validation)))
    assert not decisions(model, every).all()
    layers = [replace(spec, router=spec.router and replace(spec.router, threshold=0.0)) for spec in model.spec.stack.layers]
    open_ = Gating()
    with torch.no_grad():  # the same weights where all layers run
        rebuilt(model, replace(model.spec, stack=model.spec.stack.with_layers(layers)))(every, extras={GATING: open_})
    runs = decisions(model, every, skip=0.4)
    assert (runs.sum(dim=1) == 3).all() and runs[:, 0].all() and len(runs.unique(dim=0)) > 1
    for r, row in enumerate(runs[:, 1:]):  # who is skipped has less than who runs
        rho = torch.stack([open_.means[i][r] for i in range(1, DEPTH)])
        assert rho[~row].max() <= rho[row].min()
    other = {**every, "input_ids": torch.where(every["prompt_mask"].bool(), every["input_ids"], 9)}
    assert torch.equal(decisions(model, other, skip=0.4), runs)
    found = continuation(model, pairs, batch=7, skip=0.4)
    assert found.metrics["layers_run"] == 3
    given = {GATING: Gating(decisions=dict(enumerate(runs.T)))}
    assert found.metrics["val_loss"] == pytest.approx(CausalLM()(model, every, extras=given).mean.item(), rel=1e-5)
    # Greedy texts under given decisions are those of each prompt's sub-network.
    plain = rebuilt(model, _base().spec)
    ids = every["input_ids"][:, :4]
    made = generate(model, ids, new=5, extras=given)
    paths = [row.nonzero().squeeze(1).tolist() for row in runs]
    assert torch.equal(made, torch.cat([generate(plain, ids[r : r + 1], new=5, path=path) for r, path in enumerate(paths)]))
    assert torch.equal(decisions(model, every, skip=0.0), torch.ones_like(runs))
    assert torch.equal(decisions(model, every, skip=0.35), runs)  # 1.75 layers are two
    with pytest.raises(BadInput, match="skip 1 is 5 of 5 layers, and 4 have a router"):
        continuation(model, pairs, skip=1.0)
    with pytest.raises(BadInput, match="attach them first"):
        continuation(_base(), pairs, skip=0.2)


def test_a_model_that_answers_rightly_has_full_marks(pairs, monkeypatch):
    answers = pairs.validation.batch(torch.arange(len(pairs.validation)))

    def oracle(model, ids, *, new, stop, attention_mask, extras):
        made = torch.full((len(ids), ids.shape[1] + new), stop)
        for r, (row, mask) in enumerate(zip(ids, attention_mask, strict=True)):
            prompt = row[mask.bool()]
            match = next(i for i, p in zip(answers["input_ids"], answers["prompt_mask"], strict=True) if torch.equal(i[p.bool()], prompt))
            target = match[len(prompt) : len(prompt) + new]
            made[r, ids.shape[1] : ids.shape[1] + len(target)] = torch.where(target == pairs.pad_id, stop, target)
        return made

    monkeypatch.setattr("layerwise.evaluate.continuation.generate", oracle)
    found = continuation(_base(), pairs).metrics
    assert found["bleu_1"] == pytest.approx(100) and found["turn_bleu_1"] == pytest.approx(100) and found["layers_run"] == DEPTH


def test_prompts_are_moved_to_the_right():
    ids, mask = left_padded(
        torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]]), torch.tensor([[True, False, False, False], [True, True, True, False]])
    )
    assert ids.tolist()[0][2:] == [5] and ids.tolist()[1] == [1, 2, 3] and mask.tolist() == [[False, False, True], [True, True, True]]


def test_distances_of_sets_are_jaccards():
    a, b = torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.0, 1, 1, 0])
    assert jaccard_distance(a, b) == pytest.approx(2 / 3) and jaccard_distance(a, a) == 0 and jaccard_distance(0 * a, 0 * a) == 0


def test_a_real_encoder_is_routed_text_by_text(minilm):
    base = import_hf(minilm)
    ids = torch.randint(1000, 20000, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([12, 7, 9, 3])[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    open_ = lw.edit.route_layers(base)
    assert torch.equal(open_(batch).hidden, base(batch).hidden)
    model = _scattered(lw.edit.route_layers(base, bias=0.0), scale=0.05)
    runs = decisions(model, batch)
    assert len({tuple(row) for row in runs.tolist()}) > 1 and runs[:, 0].all() and runs[:, -1].all()
    with torch.no_grad():
        made = model(batch).hidden
        for r, row in enumerate(runs):
            path = row.nonzero().squeeze(1).tolist()
            alone = base({"input_ids": ids[r : r + 1], "attention_mask": mask[r : r + 1]}, path=path).hidden[0]
            torch.testing.assert_close(made[r][mask[r] == 1], alone[mask[r] == 1], rtol=1e-4, atol=1e-5)


def test_where_no_layer_has_a_router_all_run_and_no_pass_is_made(monkeypatch):
    model = _base()
    monkeypatch.setattr(type(model), "forward", None)
    assert decisions(model, {"input_ids": torch.arange(8).view(2, 4)}).tolist() == [[True] * DEPTH] * 2
