"""The family of linears: what they compute, what they store, what merging leaves."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from layerwise.errors import BadInput
from layerwise.nn.linear import make_linear
from layerwise.nn.linears.loqt import Full, LoQT
from layerwise.nn.linears.sparse import SparseLowRank, _Product, dense
from layerwise.nn.nf4 import dequantize, quantize
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import LayerSpec

SPECS = {
    "dense": LinearSpec(),
    "lora": LinearSpec("lora", rank=3, alpha=6),
    "low-rank": LinearSpec("low-rank", rank=3),
    "sparse-low-rank": LinearSpec("sparse-low-rank", rank=3, alpha=6, density=0.1),
    "nf4": LinearSpec("nf4"),
    "qlora": LinearSpec("qlora", rank=3, alpha=6, double=True),
    "packed": LinearSpec("packed", bits=3, group=8),
    "packed-lora": LinearSpec("packed-lora", bits=4, rank=3, alpha=6),
    "packed-low-rank": LinearSpec("packed-low-rank", bits=4, rank=3, alpha=6, group=8),
    "loqt": LinearSpec("loqt", rank=3, alpha=0.5),
    "loqt-full": LinearSpec("loqt", rank=3, alpha=0.5, store="full"),
}


def _made(spec, inner=20, outer=28, bias=True, seed=0, fill=True):
    linear = make_linear("q", inner, outer, bias, LayerSpec(linears={"q": spec}))
    generator = torch.Generator().manual_seed(seed)
    linear.initialize(0.1, generator)
    if fill:
        with torch.no_grad():
            for p in linear.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
            if isinstance(linear, LoQT):
                linear.directions.store(torch.randn(linear.directions_shape, generator=generator))
    return linear


X = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("kind", SPECS)
def test_every_kind_computes_what_its_matrix_does_and_merges_into_a_dense_linear(kind):
    linear = _made(SPECS[kind])
    expected = F.linear(X, linear.materialize(), linear.bias)
    torch.testing.assert_close(linear(X), expected, atol=1e-5, rtol=1e-5)
    merged = linear.merge()
    torch.testing.assert_close(merged(X), expected, atol=1e-5, rtol=1e-5)
    assert merged.weight.requires_grad and merged.weight.data_ptr() != getattr(linear, "weight", X).data_ptr()
    assert linear.bytes == sum(t.numel() * t.element_size() for t in linear.state_dict().values())


@pytest.mark.parametrize("kind", SPECS)
def test_the_input_gradient_is_that_of_the_dense_matrix(kind):
    linear = _made(SPECS[kind])
    ours, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    linear(ours).square().sum().backward()
    F.linear(theirs, linear.materialize().detach(), linear.bias.detach()).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def _parts(seed=0):
    linear = _made(SPECS["sparse-low-rank"], seed=seed).double()
    return linear, [linear.factor_a, linear.factor_b, linear.values]


def test_sltrain_1_output_and_gradients_equal_autograd_through_the_dense_construction():
    linear, parts = _parts()
    x = X.double().requires_grad_()
    linear(x).sin().sum().backward()
    got = [x.grad, *(p.grad for p in parts), linear.bias.grad]
    copies = [t.detach().clone().requires_grad_() for t in (x, *parts, linear.bias)]
    cx, a, b, v, bias = copies
    w = (linear.scale * b @ a).flatten().index_put((linear.places.long(),), v, accumulate=True).view(28, 20)
    F.linear(cx, w, bias).sin().sum().backward()
    for ours, theirs in zip(got, copies, strict=True):
        torch.testing.assert_close(ours, theirs.grad, atol=1e-10, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda *t: _Product.apply(*t, linear.places, linear.scale), (cx, a, b, v))


def test_sltrain_2_places_are_unique_sorted_in_range_and_of_the_seed():
    linear = _made(SPECS["sparse-low-rank"])
    places = linear.places
    assert len(places) == int(0.1 * 20 * 28) and (places.diff() > 0).all() and places[0] >= 0 and places[-1] < 20 * 28
    assert torch.equal(places, _made(SPECS["sparse-low-rank"]).places)
    assert not torch.equal(places, _made(SPECS["sparse-low-rank"], seed=1).places)
    before = places.clone()
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(X).square().sum().backward()
    optimizer.step()
    assert torch.equal(linear.places, before)


def test_sltrain_3_at_the_start_the_matrix_is_the_sparse_part_alone():
    linear = _made(SPECS["sparse-low-rank"], fill=False)
    sparse = torch.zeros(28 * 20).scatter(0, linear.places.long(), linear.values.detach()).view(28, 20)
    assert torch.equal(linear.materialize(), sparse)
    torch.testing.assert_close(linear(X), F.linear(X, sparse))
    linear(X).square().sum().backward()
    assert linear.factor_a.grad.abs().max() == 0 and linear.factor_b.grad.abs().max() > 0 and linear.values.grad.abs().max() > 0


def test_sltrain_4_nothing_of_the_size_of_the_matrix_is_saved_for_backward():
    linear, saved = _made(SPECS["sparse-low-rank"]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear(X)
    assert saved and max(saved) < 20 * 28


def test_sltrain_5_limits_are_dense_and_low_rank():
    a, b = torch.randn(3, 20), torch.randn(28, 3)
    values, everywhere = torch.randn(560), torch.arange(560)
    torch.testing.assert_close(dense(a, 0 * b, values, everywhere, 2.0), values.view(28, 20))
    torch.testing.assert_close(dense(a, b, values[:0], everywhere[:0], 2.0), 2.0 * b @ a)
    x, v = X.clone().requires_grad_(), values.clone().requires_grad_()
    _Product.apply(x, a, 0 * b, v, everywhere, 2.0).sin().sum().backward()
    w = values.view(28, 20).clone().requires_grad_()
    F.linear(X, w).sin().sum().backward()
    torch.testing.assert_close(v.grad.view(28, 20), w.grad)


def test_sltrain_6_few_random_entries_make_the_matrix_full_rank():
    linear = _made(LinearSpec("sparse-low-rank", rank=4, density=0.03), 256, 256)
    assert torch.linalg.matrix_rank(linear.materialize().double()) == 256


@pytest.mark.parametrize(
    ("width", "ffn", "depth", "rank", "total"),
    [(512, 1376, 8, 128, 43.5e6), (768, 2048, 12, 256, 96.5e6), (1024, 2736, 24, 256, 194.2e6)],
)
def test_sltrain_7_parameters_are_those_of_the_paper(width, ffn, depth, rank, total):
    spec = LinearSpec("sparse-low-rank", rank=rank, density=0.03)
    with torch.device("meta"):
        shapes = [(width, width)] * 4 + [(width, ffn), (width, ffn), (ffn, width)]
        layer = [SparseLowRank(i, o, False, spec) for i, o in shapes]
    for linear, (i, o) in zip(layer, shapes, strict=True):
        assert sum(p.numel() for p in linear.parameters()) == rank * (i + o) + int(0.03 * i * o)
    count = depth * (sum(p.numel() for m in layer for p in m.parameters()) + 2 * width) + 2 * 32000 * width + width
    assert count == pytest.approx(total, rel=1e-3)


def _gradient(linear, x=X):
    merged = linear.materialize().detach()
    linear.open()
    linear(x).sin().sum().backward()
    assert linear.opened is not None
    return merged, linear.opened.gradient


@pytest.mark.parametrize(("inner", "outer"), [(20, 28), (28, 20), (24, 24)])
def test_loqt_1_2_3_4_update(inner, outer):
    x = torch.randn(6, inner, generator=torch.Generator().manual_seed(3))
    for store in ("full", "nf4"):
        linear = _made(LinearSpec("loqt", rank=4, alpha=0.5, store=store), inner, outer)
        before = linear(x).detach()
        merged, gradient = _gradient(linear, x)
        base = linear.opened.base
        plain = (merged - base.matrix()).norm()
        # Check 8: the dense gradient is autograd's through the dequantized matrix.
        w = base.matrix().clone().requires_grad_()
        F.linear(x, w, linear.bias).sin().sum().backward()
        torch.testing.assert_close(gradient, w.grad, atol=1e-5, rtol=1e-5)
        linear.close(5)
        assert linear.left == (inner <= outer)
        b, a = linear.factors()
        fixed = a if linear.left else b.t()
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        subspace = vh[:4] if linear.left else u[:, :4].t()
        if store == "full":
            # Check 1: merging keeps the function. Check 4: orthonormal, and the gradient's top subspace.
            torch.testing.assert_close(linear(x), before, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(fixed @ fixed.t(), torch.eye(4), atol=1e-5, rtol=0)
            torch.testing.assert_close(torch.linalg.svdvals(fixed @ subspace.t()), torch.ones(4))
        else:
            # Check 2: never worse than plain quantization, here better. Check 3: the repair is the least-squares one.
            rest = merged - linear.base.matrix() - linear.scale * b.detach() @ a.detach()
            assert rest.norm() < plain
            assert (rest @ a.t() if linear.left else b.t() @ rest).abs().max() < 1e-5


def test_loqt_2_more_rounds_are_never_worse():
    errors = []
    for rounds in range(6):
        linear = _made(LinearSpec("loqt", rank=4), 64, 64)
        x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
        merged, _ = _gradient(linear, x)
        linear.close(rounds)
        errors.append((merged - linear.materialize()).norm().item())
    assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]


def test_a_linear_that_is_read_twice_is_done_when_it_has_heard_twice():
    linear = _made(LinearSpec("loqt", rank=4), 24, 24, bias=False)
    heard = []
    linear.open(lambda: heard.append(linear.opened.gradient.clone()))
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(3))
    linear(linear(x).sin()).sum().backward()
    w = linear.opened.base.matrix().clone().requires_grad_()
    F.linear(F.linear(x, w).sin(), w).sum().backward()
    assert len(heard) == 1
    torch.testing.assert_close(heard[0], w.grad, atol=1e-5, rtol=1e-5)
    known_to_autograd = linear.opened
    linear.close(1)
    assert known_to_autograd.gradient is None


@pytest.mark.parametrize(("inner", "outer"), [(20, 28), (28, 20)])
def test_loqt_5_6_only_the_free_factor_learns_and_its_gradient_is_the_projected_one(inner, outer):
    linear = _made(LinearSpec("loqt", rank=4, alpha=0.5), inner, outer, bias=False)
    assert [n for n, p in linear.named_parameters()] == ["free"]
    x = torch.randn(6, inner)
    linear(x).sin().sum().backward()
    w = linear.materialize().detach().clone().requires_grad_()
    F.linear(x, w).sin().sum().backward()
    b, a = linear.factors()
    expected = 0.5 * (w.grad @ a.t() if linear.left else b.t() @ w.grad)
    torch.testing.assert_close(linear.free.grad, expected, atol=1e-4, rtol=1e-4)


def test_the_fixed_factor_repairs_with_its_quantized_self():
    linear = _made(LinearSpec("loqt", rank=4), 64, 64)
    fixed = linear.directions.matrix()
    torch.testing.assert_close(dequantize(quantize(fixed), (4, 64)), fixed)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_folding_keeps_the_matrix_and_starts_the_term_anew(kind):
    linear = _made(SPECS[kind])
    before = linear.materialize().detach()
    linear.fold(torch.Generator().manual_seed(1))
    expected = before if kind == "lora" else dequantize(quantize(before, 64, True), (28, 20))
    torch.testing.assert_close(linear.materialize(), expected)
    assert linear.lora_b.abs().max() == 0


def test_four_bits_are_four_bits():
    linear = _made(LinearSpec("nf4"), 256, 512, bias=False)
    assert linear.bytes == 256 * 512 // 2 + 256 * 512 // 64 * 4
    assert _made(LinearSpec("nf4", double=True), 256, 512, bias=False).bytes * 8 / (256 * 512) == pytest.approx(4.127, abs=0.005)


def test_autocast_multiplies_in_bfloat16_and_gradients_keep_their_types():
    for kind in ("sparse-low-rank", "nf4", "loqt"):
        linear = _made(SPECS[kind])
        with torch.autocast("cpu", torch.bfloat16):
            y = linear(X)
        y.float().sum().backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in linear.parameters())


def test_a_rank_above_the_matrix_is_refused():
    with pytest.raises(BadInput, match="has rank 20 at most; rank is 21"):
        _made(LinearSpec("loqt", rank=21))
    with pytest.raises(BadInput, match="needs rank"):
        LinearSpec("sparse-low-rank")
    with pytest.raises(BadInput, match="leaves no entry"):
        _made(LinearSpec("sparse-low-rank", rank=2, density=1e-5))


def test_a_star_stands_for_all_roles_that_are_not_named():
    spec = LayerSpec(width=16, ffn="swiglu", linears={"*": LinearSpec("nf4"), "o": LinearSpec()}).resolve(0, 1, 16)
    assert {r: s.kind for r, s in spec.linears.items()} == {
        "q": "nf4",
        "k": "nf4",
        "v": "nf4",
        "o": "dense",
        "gate": "nf4",
        "up": "nf4",
        "down": "nf4",
    }


@pytest.mark.parametrize(
    ("width", "ffn", "depth", "rank", "sltrain", "loqt"),
    [(512, 1376, 8, 128, 0.755, 0.708), (1024, 2736, 24, 256, 0.543, 0.450)],
)
def test_parameters_gradients_and_adam_take_the_share_of_dense_training_that_arithmetic_says(width, ffn, depth, rank, sltrain, loqt):
    """At the papers' 60M and 350M sizes, 16-bit numbers and moments; indices and packed codes as they are stored."""
    shapes = [(width, width)] * 4 + [(width, ffn), (width, ffn), (ffn, width)]
    other = 8 * (2 * 32000 * width + (2 * depth + 1) * width)

    def held(spec):
        with torch.device("meta"):
            made = [make_linear("q", i, o, False, LayerSpec(linears={"q": spec})) for i, o in shapes]
        stored = sum(b.numel() * b.element_size() for m in made for b in m.buffers())
        return other + depth * (stored + 8 * sum(p.numel() for m in made for p in m.parameters()))

    full = held(LinearSpec())
    assert held(LinearSpec("sparse-low-rank", rank=rank)) / full == pytest.approx(sltrain, abs=0.01)
    assert held(LinearSpec("loqt", rank=rank)) / full == pytest.approx(loqt, abs=0.01)


class _Rounded(torch.nn.Module):
    """Stands in for NF4: multiples of 1 / parts."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def store(self, matrix):
        self.kept = (matrix * self.parts).round() / self.parts

    def matrix(self, dtype=None):
        return self.kept


@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
def test_loqt_directions_and_compensation_are_those_of_the_published_code(shape):
    """Matrix and gradient are formulas; both sides round in place of NF4, and what the adapter adds does not depend on signs."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "loqt.json").read_text())[f"{shape[0]}x{shape[1]}"]
    linear = _made(LinearSpec("loqt", rank=2, alpha=0.5), inner=shape[1], outer=shape[0], bias=False, fill=False)
    linear.base, linear.directions = Full(shape), _Rounded(8)
    count = torch.arange(shape[0] * shape[1]).double() ** 2
    matrix = (torch.sin(count * 0.13) * 0.9).view(shape).float()
    linear.store(matrix)
    linear.open()
    linear.opened.base = _Rounded(3)
    linear.opened.base.store(matrix)
    linear.opened(torch.cos(count * 0.29).view(shape).float())
    linear.close(5)
    b, a = linear.factors()
    product = 0.5 * (b @ a).detach()
    torch.testing.assert_close(linear.base.kept.flatten()[:6], torch.tensor(golden["stored"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(product.flatten()[:6], torch.tensor(golden["product"]), rtol=1e-4, atol=1e-5)
    assert float((matrix - linear.base.kept - product).norm()) == pytest.approx(golden["error"], rel=1e-4)


def test_sltrain_output_and_gradients_are_those_of_the_published_code():
    """andyjm3/SLTrain at 2335d62: its C++ kernel and layer, built, on parts and inputs that are formulas."""
    golden = {
        "y": [-0.345720734, -0.506539434, -0.458112205, -0.539183082],
        "x": [0.474559173, 1.005572557, 0.768795279, 1.345710022],
        "a": [0.074866627, -0.054529766, -0.158279958, -0.187588612],
        "b": [-0.109748886, 0.204118817, -0.211996409, 0.070227936],
        "values": [0.355954648, -0.331548952, -0.023208814, 0.280088896],
        "bias": [0.647007978, -0.043441325, -0.701015099, -0.828074622],
    }
    linear = _made(LinearSpec("sparse-low-rank", rank=2, alpha=3, density=0.25), inner=6, outer=8, fill=False).double()
    for k, part in enumerate((linear.factor_a, linear.factor_b, linear.values, linear.bias)):
        part.data = (0.5 * torch.sin(torch.arange(part.numel()).double() ** 2 * 0.017 + k)).view(part.shape)
    linear.places = torch.arange(12, dtype=linear.places.dtype) * 4 + 1
    x = torch.cos(torch.arange(2 * 3 * 6).double() * 0.7).view(2, 3, 6).requires_grad_()
    y = linear(x)
    (y * torch.sin(torch.arange(y.numel()).double() * 0.9).view(y.shape)).sum().backward()
    parts = {"a": linear.factor_a, "b": linear.factor_b, "values": linear.values, "bias": linear.bias}
    made = {"y": y[1, 2], "x": x.grad, **{name: p.grad for name, p in parts.items()}}
    for name, value in made.items():
        torch.testing.assert_close(value.detach().flatten()[:4], torch.tensor(golden[name], dtype=torch.float64), rtol=0, atol=2e-8)
