"""AWQ: scales of inputs and cut-off ranges, alone and after the correction of propagated error."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers as T
from torch.nn import functional as F

import layerwise as lw
from layerwise.edit.quantization.engine import Recipe, calibration_rows, enter, quantized_layers
from layerwise.edit.quantization.gptq import rtn
from layerwise.edit.quantization.moments import Moments, corrected
from layerwise.edit.quantization.passage import GROUPS, Passage
from layerwise.edit.quantization.scaling import best_scale, branch_change, clipped, matrix_change, scale_group, scale_layer
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec

GOLDEN = Path(__file__).parents[1] / "golden"


def _model(depth=2, **layer):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 48, "init_std": 0.3}
    data["stack"]["layer"] |= {"heads": 2, "ffn_width": 80, **layer}
    return build(model_spec({**data, "embedding": {"vocab": 262, "std": 0.5}})).eval()


def _rows(text, n=8):
    return {"input_ids": text.train.batch(torch.arange(n))["input_ids"]}


def _calibration(text, n):
    """The rows that the engine draws with seed 0."""
    (rows,) = calibration_rows(text, n, n, "train", 1, 0, torch.device("cpu"))
    return rows


def _passage(model, rows, index=0):
    x, ctx = enter(model, rows)
    for i in range(index):
        x = model.stack.layers[i](x, ctx, (i, 0))
    return Passage(index, copy.deepcopy(model.stack.layers[index]), [x], [ctx])


def _group(at, which):
    linears = at.group(*GROUPS[which])
    return linears, {role: m.weight.detach() for role, m in linears.items()}, at.moments(list(linears.values())[-1])[0]


# --- scales


@torch.no_grad()
@pytest.mark.parametrize("measure", ["awq", "awq-branch"])
@pytest.mark.parametrize("layer", [{}, {"kv_heads": 1}, {"norm": "rmsnorm_zero"}, {"ffn": "gelu"}])
def test_a_scaled_layer_computes_the_same(layer, measure, text):
    model = _model(**layer)
    at = _passage(model, _rows(text), index=1)
    before = at.out(0)
    scale_layer(at, measure, bits=2, group=None)
    torch.testing.assert_close(at.out(0), before, atol=1e-4, rtol=1e-4)
    assert not torch.equal(at.layer.mixer.branch.q.weight, model.stack.layers[1].mixer.branch.q.weight)


@torch.no_grad()
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_without_a_correction_the_scaled_layer_is_rounded_as_any_other_bit_for_bit(method, text):
    model = _model(depth=1)
    (made,) = quantized_layers(model, text, [3], Recipe(method, scale="awq"), samples=8)
    (plain,) = quantized_layers(model, text, [3], Recipe(method), samples=8)
    at = _passage(model, _calibration(text, 8))
    scale_layer(at, "awq", bits=3)
    model.stack.layers[0] = at.layer
    (expected,) = quantized_layers(model, text, [3], Recipe(method), samples=8)
    for place, (codes, grid) in expected.codes.items():
        assert torch.equal(made.codes[place][0], codes) and torch.equal(made.codes[place][1].scales, grid.scales)
    assert any(not torch.equal(made.codes[place][0], codes) for place, (codes, _) in plain.codes.items())


def _read(layer, x, ctx, i, linear):
    seen = []
    handle = linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    layer(x, ctx, (i, 0))
    handle.remove()
    return seen[0]


def _by_hand(model, rows, bits, strength, search_first):
    """Every group in turn: corrected, its scales searched (on what it was before, if `search_first`), rounded to nearest."""
    now, ctx = enter(model, rows)
    full, made = now, []
    for i, layer in enumerate(model.stack.layers):
        work = copy.deepcopy(layer)
        sources = [work.mixer.norm, work.mixer.branch.v, work.ffn.norm, work.ffn.branch.up]
        for (side, roles), source in zip(GROUPS, sources, strict=True):
            linears, originals = ([getattr(getattr(m, side).branch, r) for r in roles] for m in (work, layer))
            x, y = _read(work, now, ctx, i, linears[0]), _read(layer, full, ctx, i, originals[0])
            before = weight = torch.cat([m.weight for m in linears])
            if roles != ("down",):
                h = x.t() @ x
                weight = weight + strength * weight @ (y - x).t() @ x @ torch.linalg.inv(h + h.diagonal().mean() * torch.eye(len(h)))
            searched, least = before if search_first else weight, float("inf")
            for step in range(20):
                scale = x.abs().mean(dim=0) ** (step / 20)
                scale = scale / (scale.max() * scale.min()).sqrt()
                codes, grid = rtn(searched * scale, bits)
                error = (x @ (grid.values(codes) / scale - searched).t()).square().sum()
                if error < least:
                    least, best = error, scale
            source.weight.div_(best if source.weight.dim() == 1 else best[:, None])
            codes, grid = rtn(weight * best, bits)
            for linear, part in zip(linears, grid.values(codes).split([m.out_features for m in linears]), strict=True):
                linear.weight.data = part
        now, full = work(now, ctx, (i, 0)), layer(full, ctx, (i, 0))
        made.append(work)
    return made


@torch.no_grad()
def test_scales_are_searched_on_corrected_weights_group_by_group_as_a_naive_loop_does(text):
    model = _model()
    walk = [m.layer for m in quantized_layers(model, text, [3, 3], Recipe("rtn", scale="awq", propagate=0.5), samples=16)]
    rows = _calibration(text, 16)
    expected, other = (_by_hand(model, rows, 3, 0.5, first) for first in (False, True))
    for made, right in zip(walk, expected, strict=True):
        for (name, a), b in zip(made.named_parameters(), right.parameters(), strict=True):
            # Ranges of v and up are rounded again when they are divided; then a number that lies between two codes may fall to the other.
            assert ((a - b).abs() <= 5e-3 * b.abs().max()).float().mean() > 0.99, name
    norms = [torch.stack([n for m in layers for n in (m.mixer.norm.weight, m.ffn.norm.weight)]) for layers in (walk, expected, other)]
    torch.testing.assert_close(norms[0], norms[1], rtol=5e-3, atol=1e-5)
    assert not torch.allclose(norms[0], norms[2], rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("recipe", [Recipe("gptq", scale="awq"), Recipe("rtn", scale="awq-branch", clip="awq")])
def test_the_first_group_which_nothing_corrects_is_rounded_alike_in_both_orders(recipe, text):
    model = _model(depth=1)
    whole, turn = (next(quantized_layers(model, text, [3], dataclasses.replace(recipe, propagate=p), samples=16)).codes for p in (0.0, 0.5))
    for role in "qkv":  # sums in another order, and the ranges of v divided later, may move a code that lies between two
        assert (whole["mixer", role][0] == turn["mixer", role][0]).float().mean() > 0.9
        if role != "v":
            torch.testing.assert_close(whole["mixer", role][1].scales, turn["mixer", role][1].scales, rtol=2e-3, atol=0)
    assert (whole["ffn", "up"][0] != turn["ffn", "up"][0]).float().mean() > 0.01


@torch.no_grad()
def test_the_packed_model_is_what_the_engine_made_where_ranges_were_divided(text):
    model = _model()
    options = {"scale": "awq-branch", "clip": "awq", "propagate": 0.5, "method": "rtn", "bits": 3, "group": 16, "samples": 8}
    packed = lw.edit.quantize(model, text, **options)
    recipe = Recipe("rtn", 16, clip="awq", scale="awq-branch", propagate=0.5)
    for layer, made in zip(packed.stack.layers, quantized_layers(model, text, [3, 3], recipe, samples=8), strict=True):
        for side, roles in GROUPS:
            for role in roles:
                linear = getattr(getattr(layer, side).branch, role)
                torch.testing.assert_close(
                    linear.materialize(), getattr(getattr(made.layer, side).branch, role).weight, rtol=1e-5, atol=1e-6
                )


@torch.no_grad()
def test_behind_a_branch_scales_are_those_of_a_search_on_transformers_own_modules(text, tmp_path):
    torch.manual_seed(0)
    config = T.LlamaConfig(vocab_size=262, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config._attn_implementation = "eager"
    theirs = T.LlamaForCausalLM(config).eval()
    for p in theirs.parameters():
        p.mul_(12) if p.dim() == 2 else p.add_(torch.rand_like(p))
    theirs.save_pretrained(tmp_path)
    model, rows = lw.load(tmp_path), _rows(text)
    block, ids = theirs.model.layers[0], rows["input_ids"]
    places = torch.arange(ids.shape[1])[None]
    mask = torch.full((1, 1, ids.shape[1], ids.shape[1]), -1e9).triu(1)
    turn = theirs.model.rotary_emb(theirs.model.embed_tokens(ids), places)
    entered = {"mixer": block.input_layernorm(theirs.model.embed_tokens(ids))}
    handle = block.mlp.register_forward_pre_hook(lambda _, given: entered.update(ffn=given[0]))
    theirs(ids)
    handle.remove()
    cases = [
        (0, block.self_attn, ["q_proj", "k_proj", "v_proj"], lambda x: block.self_attn(x, turn, attention_mask=mask)[0], entered["mixer"]),
        (2, block.mlp, ["gate_proj", "up_proj"], block.mlp, entered["ffn"]),
    ]
    differs = []
    for which, module, names, run, x in cases:
        linears = [getattr(module, n) for n in names]
        kept, true, least = [m.weight.data.clone() for m in linears], run(x), float("inf")
        for step in range(20):
            scale = x.abs().flatten(0, 1).mean(dim=0) ** (step / 20)
            scale = scale / (scale.max() * scale.min()).sqrt()
            for linear, weight in zip(linears, kept, strict=True):
                codes, grid = rtn(weight * scale, 3)
                linear.weight.data = grid.values(codes) / scale
            error = (run(x) - true).square().sum().item()
            if error < least:
                least, best = error, scale
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = weight
        at = _passage(model, rows)
        torch.testing.assert_close(scale_group(at, *_group(at, which), "awq-branch", bits=3), best, rtol=1e-4, atol=1e-5)
        at = _passage(model, rows)
        differs.append(not torch.allclose(scale_group(at, *_group(at, which), "awq", bits=3), best, rtol=1e-3))
    assert any(differs)


@torch.no_grad()
@pytest.mark.parametrize("measure", ["awq", "awq-branch"])
def test_padding_is_not_looked_at(measure, text):
    model, rows = _model(), _rows(text)
    padded = {
        "input_ids": F.pad(rows["input_ids"], (0, 9), value=7),
        "attention_mask": F.pad(torch.ones_like(rows["input_ids"]), (0, 9)),
    }
    for which in range(4):
        scales = []
        for given in (rows, padded):
            at = _passage(model, given)
            scales.append(scale_group(at, *_group(at, which), measure, bits=3))
        torch.testing.assert_close(*scales, rtol=1e-4, atol=1e-5)
        if measure == "awq-branch" and which in (0, 2):
            errors = []
            for given in (rows, padded):
                at = _passage(model, given)
                linears, matrices, _ = _group(at, which)
                weights = list(matrices.values())
                errors.append(branch_change(at, linears, weights)([1.1 * weight for weight in weights]))
            assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_magnitudes_count_in_any_unit():
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 24, generator=g), torch.randn(300, 24, generator=g) * torch.rand(24, generator=g)
    size, change = x.abs().mean(dim=0), matrix_change([weight], x.t() @ x)
    once, small = (best_scale([weight], size * unit, change, bits=3) for unit in (1.0, 1e-5))
    torch.testing.assert_close(small, once)
    assert once.min() < 0.9 < 1.1 < once.max()


# --- cut-off ranges


@torch.no_grad()
@pytest.mark.parametrize("group", [None, 10])
def test_a_row_is_cut_off_where_its_outputs_change_least(group):
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 24, generator=g), torch.randn(300, 24, generator=g) @ torch.randn(24, 24, generator=g)
    weight[:, 3::10] += 4.0  # large, and of little use
    x[:, 3::10] *= 0.02
    made, shares = clipped(weight, x.t() @ x, 2, group), set()
    for row, start in ((r, s) for r in range(6) for s in range(0, 24, group or 24)):
        part = slice(start, start + (group or 24))
        w, inputs, least = weight[row : row + 1, part], x[:, part], float("inf")
        for step in range(10):
            limit = w.abs().max() * (1 - step / 20)
            codes, grid = rtn(w.clamp(-limit, limit), 2)
            error = (inputs @ (grid.values(codes) - w).t()).square().sum()
            if error < least:
                least, best, share = error, w.clamp(-limit, limit), step
        torch.testing.assert_close(made[row : row + 1, part], best)
        shares.add(share)
    assert len(shares) > 1 and max(shares) == 9


@torch.no_grad()
def test_queries_and_keys_are_not_cut_off_and_the_stream_has_less_error(text):
    model = _model(depth=1)
    (plain,), (cut,) = (quantized_layers(model, text, [2], Recipe("rtn", clip=c), samples=16, reference=True) for c in (False, "awq"))
    changed = {role: not torch.equal(plain.codes[side, role][0], cut.codes[side, role][0]) for side, roles in GROUPS for role in roles}
    assert changed == {role: role not in "qk" for _, roles in GROUPS for role in roles}
    assert cut.error < plain.error


def test_what_cannot_be_is_refused(text):
    with pytest.raises(BadInput, match="set method: rtn or clip: true"):
        lw.edit.quantize(_model(), text, clip="awq")
    thin = lw.edit.factorize(_model(), rank=4)
    with pytest.raises(BadInput, match="low-rank"):
        lw.edit.quantize(thin, text, method="rtn", clip="awq")


# --- golden numbers


def _formulas(rows, tokens):
    at = torch.arange(rows * 32, dtype=torch.float64)
    w = torch.sin(at * 1.7 + 0.3 * at.sqrt()).view(rows, 32).float()
    at = torch.arange(tokens * 32, dtype=torch.float64)
    x = torch.cos(at * 0.37 + at.pow(1.5) * 0.01).view(tokens, 32)
    x = (x + 0.6 * x.roll(1, 1) + 0.3 * x.roll(3, 0)).float() * torch.linspace(0.5, 2, 32)
    return w, x * torch.linspace(0.2, 3, 32)[torch.arange(32) * 7 % 32]


def test_awq_finds_the_scales_that_its_authors_code_finds_for_one_matrix():
    w, x = _formulas(32, 96)
    h = x.t() @ x
    for case in json.loads((GOLDEN / "awq.json").read_text())["cases"]:
        weight = w.t() if case["turned"] else w
        change = matrix_change([weight], h)
        made = best_scale([weight], x.abs().mean(dim=0), change, bits=case["bits"], group=case["group"], stored=torch.float32)
        torch.testing.assert_close(made, torch.tensor(case["scales"]), atol=2e-5, rtol=1e-5)


def test_a_matrix_corrected_scaled_cut_off_and_rounded_has_the_numbers_of_the_authors_code():
    golden = json.loads((GOLDEN / "qep_awq.json").read_text())
    w, x = _formulas(64, 512)
    full = x + 0.2 * torch.sin(3 * x).roll(2, 1)
    moments = Moments(32)
    moments.add(x.view(4, 128, 32), None, full.view(4, 128, 32))
    weight = corrected(w, moments.hessian, moments.cross, golden["strength"], golden["damping"])
    for case in golden["cases"]:
        grid = {"bits": case["bits"], "group": case["group"], "stored": torch.float32}
        scale = best_scale([weight], moments.size, matrix_change([weight], moments.hessian), **grid)
        torch.testing.assert_close(scale, torch.tensor(case["scales"]), atol=2e-5, rtol=2e-5)
        cut = clipped(weight * scale, moments.hessian / scale[:, None] / scale, **grid)
        torch.testing.assert_close(cut[:4], torch.tensor(case["clipped"]).view(4, 32), atol=2e-5, rtol=1e-4)
        codes, made = rtn(cut, **grid)
        torch.testing.assert_close(made.values(codes)[:4], torch.tensor(case["rounded"]).view(4, 32), atol=2e-5, rtol=1e-4)
