"""Binary parts (card 094): values, hand-made gradients, estimators, packed storage."""

import json
from pathlib import Path

import pytest
import torch

import layerwise as lw
from layerwise.embed.one_bit import OneBitTable
from layerwise.errors import BadInput
from layerwise.models.heads import Pooler
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.binarize import Elastic, binary_weight, sign
from layerwise.nn.binary_attention import BinaryAttention, Estimators
from layerwise.nn.linear import make_linear
from layerwise.nn.linears.binary import Binary
from layerwise.stack.context import Context
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import LayerSpec

IDS = torch.randint(0, 50, (2, 10), generator=torch.Generator().manual_seed(0))


def _elastic(alpha, signed=True):
    made = Elastic(signed)
    made.initialize(0.0, torch.Generator())
    with torch.no_grad():
        made.alpha.fill_(alpha)
        made.ready.fill_(True)
    return made


def _bert(binary=True, rank=1, embedding=True):
    data = preset("bert")
    data["stack"] |= {"depth": 2, "width": 32}
    data["stack"]["layer"] |= {"heads": 4}
    data["embedding"] |= {"vocab": 50}
    model = build(model_spec(data)).eval()
    return lw.edit.binarize(model, estimator_rank=rank, embedding=embedding) if binary else model


def test_1_2_4_7_weights_have_two_values_scaled_by_mean_magnitude_and_pass_gradients_through():
    weight = (torch.randn(8, 6) + 0.5).requires_grad_()
    made = binary_weight(weight)
    assert made.unique().numel() == 2
    torch.testing.assert_close(made.abs(), weight.abs().mean().expand(8, 6))
    assert torch.equal(sign(torch.tensor([0.0, -0.0, -1.0])), torch.tensor([1.0, 1.0, -1.0]))
    g = torch.randn(8, 6)
    (made * g).sum().backward()
    torch.testing.assert_close(weight.grad, g)
    rows = binary_weight(weight.detach(), rows=True)
    torch.testing.assert_close(rows.abs()[:, 0], weight.detach().abs().mean(dim=1))


def test_1_3_elastic_activations_on_five_numbers_by_hand():
    x = torch.tensor([-2.0, -0.4, 0.0, 0.3, 0.9], requires_grad=True)
    g = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    signed = _elastic(0.5)
    y = signed(x)
    assert torch.equal(y, torch.tensor([-0.5, -0.5, 0.5, 0.5, 0.5]))
    y.backward(g)
    assert torch.equal(x.grad, torch.tensor([0.0, 2.0, 3.0, 4.0, 0.0]))
    torch.testing.assert_close(signed.alpha.grad, torch.tensor((-1 - 2 + 3 + 4 + 5) / 5**0.5))

    x = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.9], requires_grad=True)
    unsigned = _elastic(0.5, signed=False)
    y = unsigned(x)
    assert torch.equal(y, torch.tensor([0.0, 0.0, 0.5, 0.5, 0.5]))
    y.backward(g)
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]))
    # round(q) - q inside, 1 above: q = 0, .2, .6, 1, 1.8
    torch.testing.assert_close(unsigned.alpha.grad, torch.tensor((0 + 2 * -0.2 + 3 * 0.4 + 0 + 5 * 1) / 5**0.5))


def test_5_without_estimates_it_is_plain_binary_attention_and_they_add_five_vectors_a_layer():
    plain, estimated = _bert(rank=0), _bert(rank=1)
    count = sum(p.numel() for p in estimated.parameters()) - sum(p.numel() for p in plain.parameters())
    assert count == 2 * 5 * (32 + 1)
    for module in estimated.modules():
        if isinstance(module, Estimators):
            for p in module.parameters():
                torch.nn.init.zeros_(p)
    assert torch.equal(plain({"input_ids": IDS}).logits, estimated({"input_ids": IDS}).logits)


def test_6_estimates_have_rank_three_at_most_and_the_true_residuals_give_the_whole_product():
    made = Estimators(16, 1)
    e = made.scores(torch.randn(1, 9, 16))
    assert torch.linalg.matrix_rank(e[0, 0], rtol=1e-5) <= 3
    q, k = torch.randn(9, 4), torch.randn(9, 4)
    qb, kb = 0.7 * sign(q), 0.6 * sign(k)
    rq, rk = q - qb, k - kb
    torch.testing.assert_close(q @ k.T, qb @ kb.T + qb @ rk.T + rq @ kb.T + rq @ rk.T, atol=1e-5, rtol=1e-5)


def test_8_the_scale_is_set_once_on_the_first_batch_and_stays_when_loaded(tmp_path):
    elastic = Elastic()
    elastic.initialize(0.0, torch.Generator())
    x = torch.randn(4, 5)
    elastic(x)
    torch.testing.assert_close(elastic.alpha.detach(), 2 * x.abs().mean())
    kept = elastic.alpha.detach().clone()
    elastic(10 * x)
    other = Elastic()
    other.load_state_dict(elastic.state_dict())
    other(100 * x)
    assert torch.equal(elastic.alpha.detach(), kept) and torch.equal(other.alpha.detach(), kept)
    model = _bert()
    logits = model({"input_ids": IDS}).logits
    lw.save(model, tmp_path / "m")
    back = lw.load(tmp_path / "m")
    back({"input_ids": IDS.flip(0)[:, :3]})
    torch.testing.assert_close(back({"input_ids": IDS}).logits, logits)


def test_packed_matrices_take_a_bit_a_weight_and_compute_the_same(tmp_path):
    model = _bert()
    logits = model({"input_ids": IDS}).logits
    packed = lw.edit.pack_binary(model)
    torch.testing.assert_close(packed({"input_ids": IDS}).logits, logits, atol=0, rtol=0)
    linear = packed.stack.layers[0].ffn.branch.up
    assert linear.bits.numel() == 32 * 128 // 8
    lw.save(packed, tmp_path / "p")
    assert torch.equal(lw.load(tmp_path / "p")({"input_ids": IDS}).logits, packed({"input_ids": IDS}).logits)
    for edit in (lw.edit.merge, lw.edit.binarize):
        with pytest.raises(BadInput):
            edit(packed)


def test_at_the_size_of_bert_the_layers_take_28_times_less_memory():
    with torch.device("meta"):
        shapes = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
        spec = LayerSpec(linears={"q": LinearSpec("binary-packed")})
        packed = sum(make_linear("q", i, o, True, spec).bytes for i, o in shapes)
    assert 26 < sum(4 * (i * o + o) for i, o in shapes) / packed < 32


def test_training_starts_from_the_teachers_weights_and_the_given_model_stays():
    teacher = _bert(binary=False)
    student = lw.edit.binarize(teacher)
    first = student.stack.layers[0].mixer.branch.q
    assert isinstance(first, Binary) and torch.equal(first.weight, teacher.stack.layers[0].mixer.branch.q.weight)
    student({"input_ids": IDS}).logits.square().mean().backward()
    assert all(p.grad is not None for p in first.parameters())


def test_token_vectors_have_two_values_a_row_and_a_tied_head_reads_the_full_ones():
    teacher, student = _bert(binary=False), _bert()
    table = student.embedding.tokens
    assert torch.equal(table.weight, teacher.embedding.tokens.weight)
    made = table(torch.arange(50))
    assert torch.equal(made.abs(), table.weight.abs().mean(dim=1, keepdim=True).expand_as(made))
    assert torch.equal(made > 0, table.weight - table.weight.mean() >= 0)
    assert student.token_matrix is table.weight
    table(torch.tensor([[3, 3]])).sum().backward()
    assert torch.equal(table.weight.grad[3], torch.full((32,), 2.0)) and table.weight.grad.count_nonzero() == 32
    assert isinstance(_bert(embedding=False).embedding.tokens, torch.nn.Embedding)


def test_a_binary_pooler_adds_its_norm_to_what_it_maps_and_a_dense_one_becomes_it():
    dense = lw.edit.classifier_head(_bert(binary=False), classes=2, pool="first", pooler="dense", seed=1).eval()
    pooler, h = dense.head.pooler, torch.randn(3, 32)
    torch.testing.assert_close(pooler(h), torch.tanh(h @ pooler.dense.weight.T + pooler.dense.bias))
    torch.testing.assert_close(dense({"input_ids": IDS}).logits, dense.head.out(pooler(dense({"input_ids": IDS}).hidden[:, 0])))
    binary = lw.edit.binarize(dense).head.pooler
    assert torch.equal(binary.dense.weight, pooler.dense.weight)
    expected = torch.nn.functional.layer_norm(binary.dense(h), (32,), eps=1e-12) + h
    torch.testing.assert_close(binary(h), torch.tanh(expected))
    with pytest.raises(BadInput, match="pooler"):
        lw.edit.classifier_head(_bert(), classes=2, pool="none", pooler="binary")


def test_a_packed_classifier_has_a_bit_a_number_everywhere_and_answers_the_same(tmp_path):
    model = lw.edit.classifier_head(_bert(), classes=2, pool="first", pooler="binary")
    logits = model({"input_ids": IDS}).logits
    packed = lw.edit.pack_binary(model)
    assert torch.equal(packed({"input_ids": IDS}).logits, logits)
    assert packed.embedding.tokens.bits.shape == (50, 4) and packed.head.pooler.dense.bits.numel() == 32 * 32 // 8
    lw.save(packed, tmp_path / "p")
    assert torch.equal(lw.load(tmp_path / "p")({"input_ids": IDS}).logits, logits)
    with pytest.raises(BadInput):
        lw.export(model, tmp_path / "hf", format="hf")


def _costs(model, rows):
    return lw.analyze.operations(model, _Rows(rows), split="validation", batch=2).metrics


class _Rows:
    """Data of which the validation split is `rows`."""

    def __init__(self, rows):
        self.validation = self
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def batch(self, index):
        return {"input_ids": self.rows[index]}


def test_operations_of_bits_are_those_of_the_dense_network_and_estimates_are_counted_as_numbers():
    dense, plain, estimated = (lw.edit.classifier_head(m, classes=2) for m in (_bert(binary=False), _bert(rank=0), _bert()))
    costs = [_costs(m, IDS) for m in (dense, plain, estimated)]
    assert costs[0]["bit_operations"] == 0 and costs[0]["operations_ratio"] == 1
    d, s, heads, layers = 32, 10, 4, 2
    bits = layers * (2 * s * (4 * d * d + 8 * d * d) + 4 * s * s * d)
    assert costs[1]["bit_operations"] == costs[2]["bit_operations"] == bits
    assert costs[1]["float_operations"] == costs[0]["float_operations"] - bits
    extra = layers * (5 * 2 * s * d + 2 * 2 * s * s + 2 * heads * s * s)
    assert costs[2]["float_operations"] - costs[1]["float_operations"] == extra
    assert costs[2]["operations"] == costs[2]["float_operations"] + bits / 64
    packed = lw.edit.pack_binary(estimated)
    cost = _costs(packed, IDS)
    assert cost["operations"] == costs[2]["operations"] and cost["bytes_ratio"] > 2 > costs[2]["bytes_ratio"]


def test_a_layer_of_berts_size_takes_56_times_fewer_operations_and_a_28th_of_the_memory():
    data = preset("bert")
    data["stack"] |= {"depth": 1, "width": 768}
    data["stack"]["layer"] |= {"heads": 12}
    data["embedding"] |= {"vocab": 30_522, "max_length": 128}
    data["head"] = None
    packed = lw.edit.pack_binary(lw.edit.binarize(build(model_spec(data))))
    cost = _costs(packed, torch.randint(0, 30_522, (1, 128)))
    assert 50 < cost["operations_ratio"] < 64  # the paper, with its heads: 56
    assert 26 < cost["bytes_ratio"] < 32  # and 28


def _fill(tensor, k, size=0.5):
    tensor.data = (size * torch.sin(torch.arange(tensor.numel()).float() ** 2 * 0.017 + k)).view(tensor.shape)


def test_attention_pooler_and_token_vectors_are_those_of_the_published_code():
    """Weights, inputs and the loss are formulas; scales begin on the first batch. Twelve heads, which the published code fixes."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "bipft.json").read_text())
    data = preset("bert")
    data["stack"] |= {"depth": 1, "width": 24}
    data["stack"]["layer"] |= {"heads": 12}
    data["embedding"] |= {"vocab": 7}
    attention = lw.edit.binarize(build(model_spec(data))).stack.layers[0].mixer.branch
    assert isinstance(attention, BinaryAttention) and attention.estimators is not None
    for j, linear in enumerate((attention.q, attention.k, attention.v)):
        _fill(linear.weight, j), _fill(linear.bias, j + 0.5, 0.1), _fill(linear.shift, j + 0.7, 0.05)
    for j, name in enumerate(("qm", "qp", "km", "kp", "vp")):
        estimate = getattr(attention.estimators, name)
        _fill(estimate.weight, 10 + j), _fill(estimate.bias, 20 + j, 0.2)
    attention.o = torch.nn.Identity()  # the published module ends before its output projection
    x = torch.cos(torch.arange(2 * 5 * 24).float() * 0.7 + 0.2).view(2, 5, 24).requires_grad_()
    context = Context()
    context.begin(x, None)
    y = attention(x, context, (0, 0))
    (y * torch.sin(torch.arange(y.numel()) * 0.9).view(y.shape)).sum().backward()
    scales = [attention.q.inputs, attention.q_bits, attention.k_bits, attention.v_bits, attention.attention_bits]
    pooler = Pooler("binary", 24, 1e-12)
    pooler.initialize(0.02, torch.Generator())
    _fill(pooler.dense.weight, 3), _fill(pooler.dense.bias, 4, 0.1), _fill(pooler.dense.shift, 5, 0.05)
    table = OneBitTable(7, 24)
    _fill(table.weight, 6)
    made = {
        "context": y[1, 4, :4],
        "x_grad": x.grad[0, 0, :4],
        "q_grad": attention.q.weight.grad.norm(),
        "shift_grad": attention.k.shift.grad[:4],
        "estimator_grad": attention.estimators.qp.weight.grad[0, :4],
        "alphas": torch.stack([s.alpha for s in scales]),
        "alpha_grads": torch.stack([scales[i].alpha.grad for i in (0, 1, 3, 4)]),
        "pooled": pooler(torch.cos(torch.arange(48).float() * 0.9).view(2, 24))[1, :4],
        "word": table(torch.tensor([3]))[0, :4],
    }
    for name, value in made.items():
        torch.testing.assert_close(value.detach(), torch.tensor(golden[name]), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
