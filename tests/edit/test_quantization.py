"""Rounding matrices: GPTQ, the correction of propagated error, token weights, rotation, and all of them in one edit.

The numbers in names are those of the checks that the methods' descriptions ask for.
"""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import layerwise as lw
from layerwise.analyze.scores import layer_order
from layerwise.edit.quantization.allocation import allocate
from layerwise.edit.quantization.engine import Recipe, calibration_rows, enter, quantized_layers, shifted
from layerwise.edit.quantization.gptq import gptq, rtn
from layerwise.edit.quantization.moments import Moments, corrected
from layerwise.edit.quantization.rotation import hadamard, orthogonal, rotated
from layerwise.edit.quantization.tokens import attention_received, token_scores, token_weights
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.integers import Grid, find_grid
from layerwise.nn.linear import Linear

G = torch.Generator().manual_seed(0)
W = torch.randn(12, 24, generator=G)
MIX = torch.randn(24, 24, generator=G)
X = torch.randn(200, 24, generator=G) @ MIX
H = X.t() @ X


def _model(depth=3, std=0.3, **layer):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 48, "init_std": std}
    data["stack"]["layer"] |= {"heads": 2, "ffn_width": 80, **layer}
    return build(model_spec({**data, "embedding": {"vocab": 256, "std": 0.5}})).eval()


def _ids(text):
    return text.train.batch(torch.arange(4))


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# --- grids


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_grid_spans_zero_and_every_row_and_its_error_is_at_most_half_a_step(bits, symmetric):
    grid = find_grid(W, bits, 10, symmetric=symmetric, stored=torch.float32)
    error = (grid.values(grid.nearest(W)) - W).abs()
    steps = grid.scales[:, torch.arange(24) // 10]
    # The two ends of an asymmetric range meet the grid up to the rounding of the zero.
    assert (error <= steps * (0.5 if symmetric else 1.0) * 1.001 + (symmetric * steps / 2)).all()
    assert torch.equal(grid.values(grid.zeros.to(torch.uint8)[:, :1]), torch.zeros(12, 1)) and grid.scales.shape == (12, 3)
    if symmetric:
        assert (grid.zeros == 2 ** (bits - 1)).all()


def test_a_clipped_range_has_no_more_error_and_scales_are_what_is_stored():
    plain, clipped = (find_grid(W, 3, symmetric=True, clip=c) for c in (False, True))

    def loss(g):
        return (g.values(g.nearest(W)) - W).abs().pow(2.4).sum(dim=1)

    assert (loss(clipped) <= loss(plain)).all() and (loss(clipped) < loss(plain)).any()
    assert torch.equal(clipped.scales, clipped.scales.half().float())


# --- GPTQ


def _slow(w, h, grid: Grid):
    """Optimal brain quantization in the columns' order, with the inverse updated by hand after every column."""
    w, inverse = w.double().clone(), torch.linalg.inv(h.double())
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for i in range(w.shape[1]):
        codes[:, i : i + 1] = grid.nearest(w[:, i : i + 1].float(), i)
        error = (w[:, i] - grid.values(codes[:, i : i + 1], i)[:, 0]) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse -= inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
        inverse[:, i] = inverse[i] = 0.0
        inverse[i, i] = 1.0
    return codes


def test_gptq_is_what_optimal_brain_quantization_gives_one_column_after_another():
    damped = H + 0.01 * torch.diagonal(H).mean() * torch.eye(24)
    codes, grid = gptq(W, H, 3)
    assert torch.equal(codes, _slow(W, damped, grid))


def test_gptq_in_the_order_of_falling_diagonals_is_gptq_of_permuted_columns():
    order = torch.argsort(torch.diagonal(H), descending=True, stable=True)
    codes, grid = gptq(W, H, 3, act_order=True)
    expected, _ = gptq(W[:, order], H[order][:, order], 3)
    assert torch.equal(codes[:, order], expected)
    assert not torch.equal(codes, gptq(W, H, 3)[0]) and torch.equal(grid.scales, find_grid(W, 3).scales)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [None, 8])
def test_qep_7_rsq_6_gptq_with_a_diagonal_h_is_rtn_and_scaling_h_changes_nothing(group, act_order):
    nearest, grid = rtn(W, 3, group)
    for h in (torch.eye(24) * 5.0, torch.diag(torch.linspace(1, 7, 24))):
        codes, same = gptq(W, h, 3, group, act_order=act_order)
        assert torch.equal(codes, nearest) and torch.equal(same.scales, grid.scales) and torch.equal(same.zeros, grid.zeros)
    codes, _ = gptq(W, H, 3, group, act_order=act_order)
    assert torch.equal(codes, gptq(W, 1024.0 * H, 3, group, act_order=act_order)[0])


def test_rsq_6_with_correlated_inputs_gptq_has_less_error_than_rtn():
    for bits in (2, 3, 4):
        (a, g), (b, r) = gptq(W, H, bits), rtn(W, bits)
        errors = [((grid.values(codes) - W) @ H * (grid.values(codes) - W)).sum() for codes, grid in ((a, g), (b, r))]
        assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_has_less_error_than_rtn_in_groups_in_order_and_on_symmetric_grids(bits):
    for group, act_order, symmetric in itertools.product((None, 8), (False, True), (False, True)):
        made = gptq(W, H, bits, group, act_order=act_order, symmetric=symmetric)
        errors = [((g.values(c) - W) @ H * (g.values(c) - W)).sum() for c, g in (made, rtn(W, bits, group, symmetric=symmetric))]
        assert errors[0] < 0.9 * errors[1]


def test_inputs_that_never_occur_are_rounded_to_zero():
    h = H.clone()
    h[3] = 0
    h[:, 3] = 0
    codes, grid = gptq(W, h, 3)
    assert (grid.values(codes)[:, 3] == 0).all() and torch.isfinite(grid.values(codes)).all()


def test_groups_wider_than_a_block_are_rounded_with_grids_made_of_moved_columns():
    w, x = torch.randn(4, 384, generator=G), torch.randn(500, 384, generator=G)
    codes, grid = gptq(w, x.t() @ x, 4, 192)
    assert grid.scales.shape == (4, 2) and torch.equal(grid.scales[:, 0], find_grid(w[:, :192], 4).scales[:, 0])
    assert not torch.equal(grid.scales[:, 1], find_grid(w[:, 192:], 4).scales[:, 0])
    assert (grid.values(codes) - w).square().mean() < 0.02


# --- QEP


FULL = X.double()
NOISY = FULL + 0.3 * torch.randn(200, 24, generator=G, dtype=torch.float64)
HH, DD = NOISY.t() @ NOISY, (FULL - NOISY).t() @ NOISY
WW = W.double()


def test_qep_1_without_error_or_strength_weights_stay_bitwise():
    assert torch.equal(corrected(WW, HH, torch.zeros_like(DD), 0.5), WW) and torch.equal(corrected(WW, HH, DD, 0.0), WW)


def test_qep_2_undamped_and_whole_the_correction_is_least_squares():
    expected = torch.linalg.lstsq(NOISY, FULL @ WW.t()).solution.t()
    torch.testing.assert_close(corrected(WW, HH, DD, 1.0, 0.0), expected, atol=1e-10, rtol=1e-10)


def test_qep_3_4_the_loss_splits_and_falls_with_strength():
    best = corrected(WW, HH, DD, 1.0, 0.0)

    def loss(v):
        return (FULL @ WW.t() - NOISY @ v.t()).square().sum()

    rest = [loss(q) - (NOISY @ (best - q).t()).square().sum() for q in (WW, WW.round(), torch.zeros_like(WW))]
    torch.testing.assert_close(torch.stack(rest), rest[0].expand(3))
    step = (NOISY @ (best - WW).t()).square().sum()
    for a in (0.0, 0.25, 0.5, 1.0):
        torch.testing.assert_close(loss(corrected(WW, HH, DD, a, 0.0)), loss(best) + (1 - a) ** 2 * step)


def test_qep_5_damped_it_is_ridge_regression_towards_the_weights():
    made, mu = corrected(WW, HH, DD, 1.0, 0.7), 0.7 * torch.diagonal(HH).mean()
    gradient = (NOISY @ made.t() - FULL @ WW.t()).t() @ NOISY + mu * (made - WW)
    assert gradient.abs().max() < 1e-8


def test_qep_6_rsq_8_moments_of_batches_are_moments_of_all():
    x, full, w = torch.randn(12, 5, 8, generator=G), torch.randn(12, 5, 8, generator=G), torch.rand(12, 5, generator=G)
    parts = Moments(8)
    for i, j in ((0, 1), (1, 6), (6, 12)):
        parts.add(x[i:j], w[i:j], full[i:j])
    h = 2 / 12 * torch.einsum("bsi,bs,bsj->ij", x, w, x)
    d = 2 / 12 * torch.einsum("bsi,bs,bsj->ij", full - x, w, x)
    torch.testing.assert_close(parts.hessian, h, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.cross, d, atol=1e-5, rtol=1e-5)


def test_qep_1_8_the_first_group_is_never_corrected_and_nothing_is_where_nothing_is_rounded(text):
    model = _model()
    plain, corrected_ = (lw.edit.quantize(model, text, bits=3, method="rtn", propagate=p, samples=8) for p in (0.0, 0.5))
    for role in "qkv":
        a, b = (getattr(m.stack.layers[0].mixer.branch, role).base for m in (plain, corrected_))
        assert _same(a.state_dict(), b.state_dict())
    assert not torch.equal(plain.stack.layers[1].mixer.branch.q.base.codes, corrected_.stack.layers[1].mixer.branch.q.base.codes)
    assert torch.equal(plain.stack.layers[0].ffn.branch.down.base.codes, corrected_.stack.layers[0].ffn.branch.down.base.codes)
    whole = lw.edit.quantize(model, text, bits=16, propagate=1.0, samples=8)
    assert torch.equal(whole(_ids(text)).logits, model(_ids(text)).logits)
    errors = [m.error for m in quantized_layers(model, text, [16, 16, 16], Recipe(propagate=1.0), samples=8)]
    assert errors == [0.0, 0.0, 0.0]


def test_the_correction_lowers_the_error_of_the_stream(text):
    model = _model(4)
    plain, fixed = (
        [m.error for m in quantized_layers(model, text, [3] * 4, Recipe("rtn", propagate=p), samples=32, reference=True)] for p in (0, 0.5)
    )
    assert fixed[-1] < plain[-1]


# --- tokens


def test_rsq_2_attention_received_sums_to_heads_times_length_and_comes_from_later_queries(text):
    model = _model()
    with torch.no_grad():
        x, ctx = enter(model, _ids(text))
        r = attention_received(model.stack.layers[0], x, ctx, 0)
        torch.testing.assert_close(r.sum(dim=1), torch.full((4,), 2.0 * x.shape[1]))
        assert (r[:, -1] <= 2).all()
        changed = x.clone()
        changed[:, 5] += 1.0
        again = attention_received(model.stack.layers[0], changed, ctx, 0)
    # A key's share in queries before 5 is untouched: with only those queries, nothing differs.
    short, _ = (lambda c: (x[:, :5], c))(ctx)
    batch = {"input_ids": _ids(text)["input_ids"][:, :5]}
    with torch.no_grad():
        y, c = enter(model, batch)
        torch.testing.assert_close(y, short)
        prefix = attention_received(model.stack.layers[0], y, c, 0)
    assert (r[:, :5] >= prefix - 1e-5).all() and not torch.equal(r, again)


def test_rsq_4_weights_have_mean_one_and_ignore_the_scale_of_scores():
    r = torch.rand(3, 16, generator=G)
    w = token_weights(r, floor=0.1)
    torch.testing.assert_close(w.mean(dim=1), torch.ones(3))
    torch.testing.assert_close(token_weights(7.5 * r, floor=0.1), w)
    torch.testing.assert_close(w.amax(dim=1) / w.amin(dim=1), torch.full((3,), 10.0))
    assert torch.equal(token_weights(torch.full((2, 4), 3.0)), torch.ones(2, 4))
    real = torch.tensor([[True, True, True, False]])
    padded = token_weights(torch.tensor([[1.0, 2.0, 3.0, 99.0]]), real, floor=0.5)
    torch.testing.assert_close(padded, torch.cat([token_weights(torch.tensor([[1.0, 2.0, 3.0]]), floor=0.5), torch.zeros(1, 1)], dim=1))


def test_rsq_3_constant_weights_give_the_moments_of_gptq_bitwise():
    x = torch.randn(4, 6, 24, generator=G)
    a, b = Moments(24), Moments(24)
    a.add(x)
    b.add(x, token_weights(torch.full((4, 6), 0.3)))
    assert torch.equal(a.hessian, b.hessian)


def test_rsq_5_weights_of_zero_and_one_are_gptq_on_the_chosen_tokens():
    x = torch.randn(4, 16, 24, generator=G) @ MIX
    mask = (torch.arange(16) < 8).float().expand(4, 16)
    weighted, chosen = Moments(24), Moments(24)
    weighted.add(x, token_weights(mask, floor=0.0))
    chosen.add(x[:, :8])
    assert torch.equal(gptq(W, weighted.hessian, 3)[0], gptq(W, chosen.hessian, 3)[0])


def test_rsq_7_shifts_are_cyclic_and_one_is_none(text):
    rows = _ids(text)
    ids = rows["input_ids"]
    assert torch.equal(shifted(rows, 1, 4)["input_ids"], torch.cat([ids[:, -8:], ids[:, :-8]], dim=1))
    one, many = (calibration_rows(text, 10, 4, "train", n, 3, torch.device("cpu")) for n in (1, 4))
    assert sum(len(r["input_ids"]) for r in one) == 10 and sum(len(r["input_ids"]) for r in many) == 40
    assert torch.equal(one[0]["input_ids"], many[0]["input_ids"])


# --- rotation


@pytest.mark.parametrize("n", [1, 2, 8, 12, 20, 24, 28, 36, 48, 96, 128, 176])
def test_hadamard_matrices_are_orthogonal_with_equal_magnitudes(n):
    h = hadamard(n)
    torch.testing.assert_close(h @ h.t(), torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(h.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("layer", [{}, {"kv_heads": 1, "qkv_bias": True, "out_bias": True, "ffn_bias": True}, {"norm": "rmsnorm_zero"}])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_rsq_1_a_rotated_model_computes_the_same(kind, tie, layer, text):
    data = preset("decoder")
    data["stack"] |= {"depth": 2, "width": 48, "init_std": 0.3}
    data["stack"]["layer"] |= {"heads": 2, "ffn_width": 80, **layer}
    data["head"]["tie"] = tie
    model = build(model_spec({**data, "embedding": {"vocab": 256, "std": 0.5}})).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.5 * torch.rand(p.shape, generator=G))
    turned = lw.edit.rotate(model, kind=kind, seed=1)
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(turned(_ids(text)).logits, model(_ids(text)).logits, atol=1e-8, rtol=1e-8)
    assert _same(before, model.state_dict()) and not turned.spec.head.tie
    assert not torch.allclose(turned.stack.layers[1].mixer.branch.q.weight, model.stack.layers[1].mixer.branch.q.weight)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_rsq_1_layers_may_have_heads_of_other_sizes(kind, text):
    data = preset("decoder")
    data["stack"] |= {"depth": 2, "width": 48, "init_std": 0.3, "overrides": {"0": {"heads": 4}}}
    data["stack"]["layer"] |= {"heads": 2, "ffn_width": 80}
    model = build(model_spec({**data, "embedding": {"vocab": 256, "std": 0.5}})).double().eval()
    turned = lw.edit.rotate(model, kind=kind)
    torch.testing.assert_close(turned(_ids(text)).logits, model(_ids(text)).logits, atol=1e-8, rtol=1e-8)
    for a, b in zip(turned.stack.layers, model.stack.layers, strict=True):
        assert not torch.allclose(a.mixer.branch.v.weight.norm(dim=1), b.mixer.branch.v.weight.norm(dim=1))


def test_rsq_1_turning_by_the_identity_changes_no_weight_of_a_model_with_gains_of_one():
    model = _model()
    turned = rotated(model, torch.eye(48, dtype=torch.float64))
    assert _same(dict(model.state_dict()), dict(turned.state_dict()))


def test_a_hadamard_rotation_takes_outliers_out_of_what_matrices_read(text):
    model = _model()
    with torch.no_grad():
        model.embedding.tokens.weight[:, 3] *= 40
    turned = rotated(model, orthogonal(48, torch.Generator().manual_seed(0)))

    def peak(m):
        x, _ = enter(m, _ids(text))
        return (x.abs().amax(dim=-1) / x.square().mean(dim=-1).sqrt()).mean()

    assert peak(turned) < 0.75 * peak(model)


def test_models_that_cannot_be_turned_are_refused():
    with pytest.raises(BadInput, match="RMSNorm"):
        lw.edit.rotate(_model(norm="layernorm"))
    with pytest.raises(BadInput, match="rotate: random"):
        hadamard(22 * 3)


# --- bits of each layer


def test_bits_3_4_means_nested_sets_and_complements():
    order = [4, 0, 3, 1, 2, 5]
    previous = [0] * 6
    for mean in torch.linspace(2, 4, 21).tolist():
        bits = allocate(order, 4, 2, mean)
        assert all(b >= p for b, p in zip(bits, previous, strict=True)) and abs(sum(bits) / 6 - mean) <= 1 / 6 + 1e-9
        mirrored = allocate(order[::-1], 4, 2, 6 - mean)
        assert [b == 4 for b in bits] == [b == 2 for b in mirrored]
        previous = bits
    assert allocate(order, 4, 2, 2.0) == [2] * 6 and allocate(order, 4, 2, 4.0) == [4] * 6
    with pytest.raises(BadInput, match="mean_bits between"):
        allocate(order, 4, 2, 5)


def test_bits_3_5_8_uniform_means_and_layers_of_equal_bits_are_the_uniform_models(text):
    model = _model()
    uniform = {b: lw.edit.quantize(model, method="rtn", bits=b, group=16).state_dict() for b in (4, 2)}
    for b in (4, 2):
        mixed = lw.edit.quantize(model, text, method="rtn", bits=4, low_bits=2, mean_bits=float(b), group=16, samples=4)
        assert _same(mixed.state_dict(), uniform[b])
    mixed = lw.edit.quantize(model, method="rtn", bits=[2, 16, 4], group=16)
    for i, bits in ((0, 2), (2, 4)):
        own = {n: t for n, t in mixed.state_dict().items() if n.startswith(f"stack.layers.{i}.")}
        assert all(torch.equal(t, uniform[bits][n]) for n, t in own.items())
    assert _same(mixed.stack.layers[1].state_dict(), model.stack.layers[1].state_dict())
    untouched = lw.edit.quantize(model, method="rtn", bits=16)
    assert _same(dict(untouched.state_dict()), dict(model.state_dict()))


def test_orders_by_score_reverse_and_chance(text):
    model = _model(4)
    order = layer_order(model, text, "input-modification", samples=8)
    assert layer_order(model, text, "input-modification", samples=8, reverse=True) == order[::-1]
    draws = {tuple(layer_order(model, text, "random", seed=s)) for s in range(8)}
    assert len(draws) > 4 and all(sorted(d) == [0, 1, 2, 3] for d in draws)


# --- the edit as a whole


def test_bits_6_bytes_are_what_bits_scales_and_zeros_take_in_memory_and_on_disk(tmp_path, text):
    model = _model()
    for bits in (2, 3, 4, 8):
        packed = lw.edit.quantize(model, method="rtn", bits=bits, group=16)
        linears = [m for m in packed.modules() if isinstance(m, Linear)]
        expected = 0
        for m in linears:
            groups = -(-m.in_features // 16) * m.out_features
            expected += -(-m.in_features * m.out_features * bits // 8) + 2 * groups + -(-groups * bits // 8)
        assert sum(m.bytes for m in linears) == expected
        lw.save(packed, tmp_path / str(bits))
        dense = sum(p.numel() * 4 for n, p in packed.named_parameters())
        assert abs((tmp_path / str(bits) / "model.safetensors").stat().st_size - expected - dense) < 12_000
        back = lw.load(tmp_path / str(bits)).eval()
        assert torch.equal(back(_ids(text)).logits, packed(_ids(text)).logits)


def test_everything_combines_in_one_edit_and_is_the_same_on_disk_and_twice(text):
    model = _model(4)
    options = {
        "bits": 4, "low_bits": 2, "mean_bits": 3.0, "group": 16, "rotate": "hadamard", "propagate": 0.5, "tokens": "attention", "scale": "awq",
        "act_order": True, "clip": True, "symmetric": True, "samples": 16, "seed": 3,
    }  # fmt: skip
    made = lw.edit.quantize(model, text, **options)
    assert _same(made.state_dict(), lw.edit.quantize(model, text, **options, spill=True).state_dict())
    assert sorted(layer.linears["q"].bits for layer in made.spec.stack.layers) == [2, 2, 4, 4]
    merged = lw.edit.merge(made)
    torch.testing.assert_close(merged(_ids(text)).logits, made(_ids(text)).logits, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(made(_ids(text)).logits).all()


def test_the_engine_passes_on_what_the_packed_layers_compute(text):
    model = _model()
    layers = list(quantized_layers(model, text, [3, 3, 3], Recipe(), samples=8))
    packed = lw.edit.quantize(model, text, bits=3, samples=8)
    with torch.no_grad():
        x, ctx = enter(model, _ids(text))
        for i, made in enumerate(layers):
            x = made.layer(x, ctx, (i, 0))
        torch.testing.assert_close(packed(_ids(text)).hidden, model.stack.norm(x), atol=1e-5, rtol=1e-4)


def test_padding_weighs_nothing(text):
    model = _model(1)
    ids = _ids(text)["input_ids"]

    class Padded:
        def __init__(self, width):
            self.width = width

        def __len__(self):
            return 4

        def batch(self, rows):
            full = F.pad(ids[rows], (0, self.width), value=7)
            return {"input_ids": full, "attention_mask": (torch.arange(full.shape[1]) < ids.shape[1]).long().expand(len(rows), -1)}

    class Data:
        train = None

    made = []
    for width in (0, 9):
        data = Data()
        data.train = Padded(width)
        made.append(lw.edit.quantize(model, data, bits=3, samples=4, tokens="attention").state_dict())
    codes = [n for n in made[0] if n.endswith("codes")]
    same = sum((made[0][n] == made[1][n]).double().mean().item() for n in codes) / len(codes)
    assert same > 0.98  # float sums in another order may move a code that lies between two


def test_lora_over_packed_matrices_trains_and_starts_where_the_model_stood(text):
    model = lw.edit.quantize(_model(), text, bits=4, samples=8)
    tuned = lw.edit.lora(model, rank=2, targets=["q", "v", "up", "down"])
    torch.testing.assert_close(tuned(_ids(text)).logits, model(_ids(text)).logits, atol=0, rtol=0)
    trained = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in n for n in trained)
    ids = _ids(text)["input_ids"]

    def loss():
        return F.cross_entropy(tuned({"input_ids": ids}).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    first = loss().item()
    for _ in range(8):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < first - 0.05
    assert torch.equal(tuned.stack.layers[0].mixer.branch.q.base.codes, model.stack.layers[0].mixer.branch.q.base.codes)
    merged = lw.edit.merge(tuned)
    torch.testing.assert_close(merged(_ids(text)).logits, tuned(_ids(text)).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "2, 3, 4, 8"),
        ({"bits": [4, 4]}, "one for each of 3"),
        ({"low_bits": 2}, "given together"),
        ({"method": "rtn", "tokens": "attention"}, "rtn does not use"),
        ({"propagate": 2.0}, "from 0 to 1"),
        ({"group": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(options, message, text):
    with pytest.raises(BadInput, match=message):
        lw.edit.quantize(_model(), text, **options)
    packed = lw.edit.quantize(_model(1), method="rtn")
    with pytest.raises(BadInput, match="edit: merge"):
        lw.edit.quantize(packed, text)


# --- golden numbers


def _golden(name):
    return json.loads((Path(__file__).parents[1] / "golden" / f"{name}.json").read_text())


def _formulas():
    """A matrix and inputs that no generator draws: what the authors' code was run on."""
    at = torch.arange(8 * 32, dtype=torch.float64)
    w = torch.sin(at * 1.7 + 0.3 * at.sqrt()).view(8, 32).float()
    at = torch.arange(96 * 32, dtype=torch.float64)
    x = torch.cos(at * 0.37 + at.pow(1.5) * 0.01).view(96, 32)
    return w, (x + 0.6 * x.roll(1, 1) + 0.3 * x.roll(3, 0)).float() * torch.linspace(0.5, 2, 32)


def test_gptq_gives_the_numbers_of_its_authors_code():
    golden = _golden("gptq")
    w, x = _formulas()
    moments = Moments(32)
    moments.add(x.view(4, 24, 32))
    torch.testing.assert_close(moments.hessian[3], torch.tensor(golden["hessian_row"]), atol=2e-4, rtol=1e-4)
    for name in ("rows", "clipped", "groups", "ordered"):
        case = golden[name]
        options = {key: case[key] for key in ("symmetric", "clip", "act_order")}
        codes, grid = gptq(w, moments.hessian, case["bits"], case["group"], **options, stored=torch.float32)
        torch.testing.assert_close(grid.values(codes), torch.tensor(case["rounded"]), atol=2e-5, rtol=1e-5)


def test_the_correction_gives_the_numbers_of_its_authors_code():
    golden = _golden("qep")
    w, x = _formulas()
    full = x + 0.2 * torch.sin(3 * x).roll(2, 1)
    moments = Moments(32)
    moments.add(x.view(4, 24, 32), None, full.view(4, 24, 32))
    torch.testing.assert_close(moments.cross[3], torch.tensor(golden["cross_row"]), atol=2e-4, rtol=1e-3)
    made = corrected(w, moments.hessian, moments.cross, golden["strength"], golden["damping"])
    torch.testing.assert_close(made, torch.tensor(golden["corrected"]), atol=1e-5, rtol=1e-4)
    assert (made - w).abs().max() > 1e-3


def test_tokens_and_their_moments_weigh_what_the_authors_code_of_rsq_makes_of_them():
    golden = _golden("rsq")
    _, x = _formulas()
    rows = x.view(4, 24, 32)
    at = torch.arange(2 * 24 * 24, dtype=torch.float64).view(1, 2, 24, 24)
    seen = (3 * torch.sin(at * 0.7 + 0.2 * at.sqrt())).float().masked_fill(torch.ones(24, 24).triu(1).bool(), -1e9).softmax(dim=-1)
    frequency = torch.tensor([(7 * i * i) % 13 for i in range(24)])
    changed = rows[:1] + 0.3 * torch.sin(5 * rows[:1])
    for kind, expected in golden["weights"].items():
        scores = seen.sum(dim=(1, 2))
        if kind != "attention":
            scores = token_scores(kind, lambda *_: changed, rows[:1], None, 0, torch.arange(24)[None], frequency, G)
        made = token_weights(scores, floor=0.0 if kind == "first" else golden["floor"])
        torch.testing.assert_close(made[0], torch.tensor(expected), atol=2e-5, rtol=1e-5)
    moments = Moments(32)
    moments.add(rows, token_weights(rows.norm(dim=-1), floor=golden["floor"]))
    torch.testing.assert_close(moments.hessian[[3, 17]], torch.tensor(golden["hessian_rows"]), atol=2e-4, rtol=1e-4)
