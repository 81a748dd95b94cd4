"""Embeddings against their sum written out, transformers' BERT and RoBERTa, and plain pixels."""

import pytest
import torch

from layerwise.embed.pixels import PixelEmbedding
from layerwise.embed.spec import PixelSpec, TokenSpec
from layerwise.embed.tokens import TokenEmbedding
from layerwise.errors import BadInput
from layerwise.models.model import token_positions
from layerwise.nn.cache import Cache
from layerwise.stack.context import PAD

IDS = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(0))


def _embedding(width=8, seed=0, **spec):
    module = TokenEmbedding(TokenSpec(vocab=30, max_length=20, **spec), width)
    module.initialize(0.5, torch.Generator().manual_seed(seed))
    return module.double().eval()


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("norm", [None, "layernorm", "rmsnorm"])
@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal"])
def test_an_embedding_is_the_sum_of_its_tables(position, norm, size):
    module = _embedding(position=position, norm=norm, size=size, types=3, scale=2.5, offset=2 if position == "learned" else 0)
    kinds = torch.randint(0, 3, (2, 6))
    at = torch.tensor([[0, 1, 2, 3, 4, 5], [4, 4, 7, 9, 0, 1]])
    made = module({"input_ids": IDS, "token_type_ids": kinds}, at)
    for b in range(2):
        for s in range(6):
            x = 2.5 * module.tokens.weight[IDS[b, s]] + module.types.weight[kinds[b, s]]
            if position == "learned":
                x = x + module.positions.weight[at[b, s] + 2]
            if position == "sinusoidal":
                half = (size or 8) // 2
                angles = at[b, s] * 10000.0 ** (-torch.arange(half).double() / half)
                x = x + torch.cat([angles.sin(), angles.cos(), torch.zeros((size or 8) % 2)])
            if norm == "layernorm":
                x = (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()
            if norm == "rmsnorm":
                x = x / (x.square().mean() + 1e-6).sqrt()
            if size is not None:
                x = module.project.weight @ x + module.project.bias
            torch.testing.assert_close(made[b, s], x, rtol=1e-5, atol=1e-5)
    assert made.shape == (2, 6, 8)


def test_missing_token_types_are_type_zero():
    module, at = _embedding(types=2), torch.arange(6)[None]
    assert torch.equal(module({"input_ids": IDS}, at), module({"input_ids": IDS, "token_type_ids": torch.zeros_like(IDS)}, at))
    assert not torch.equal(module({"input_ids": IDS}, at), module({"input_ids": IDS, "token_type_ids": torch.ones_like(IDS)}, at))


def test_embeddings_of_bert_and_roberta():
    import transformers as t
    from transformers.models.bert.modeling_bert import BertEmbeddings
    from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

    sizes = {"vocab_size": 30, "hidden_size": 8, "max_position_embeddings": 20, "hidden_dropout_prob": 0.0}
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    ids = (IDS.clamp(min=2) * mask) + (1 - mask)  # RoBERTa tells padding by its id, 1
    for theirs, offset in (
        (BertEmbeddings(t.BertConfig(**sizes, pad_token_id=1)), 0),
        (RobertaEmbeddings(t.RobertaConfig(**sizes, type_vocab_size=2, pad_token_id=1)), 2),
    ):
        ours = TokenEmbedding(
            TokenSpec(vocab=30, position="learned", max_length=20 - offset, offset=offset, types=2, norm="layernorm", norm_eps=1e-12), 8
        )
        names = {"tokens": "word_embeddings", "positions": "position_embeddings", "types": "token_type_embeddings", "norm": "LayerNorm"}
        ours.load_state_dict({n: theirs.state_dict()[n.replace(k, names[k])] for n in ours.state_dict() for k in [n.split(".")[0]]})
        made = ours({"input_ids": ids}, token_positions(ids, mask.bool(), None, None))
        real = mask.bool()
        torch.testing.assert_close(made[real], theirs(input_ids=ids)[real], rtol=1e-5, atol=1e-6)
        if offset:
            torch.testing.assert_close(made, theirs(input_ids=ids), rtol=1e-5, atol=1e-6)


def test_initial_tables_have_their_standard_deviation():
    for std, expected in ((None, 0.5), (0.632, 0.632), (0.0, 0.0)):
        module = TokenEmbedding(TokenSpec(vocab=500, position="learned", max_length=500, std=std), 40)
        module.initialize(0.5, torch.Generator().manual_seed(0))
        for table in (module.tokens, module.positions):
            assert table.weight.std().item() == pytest.approx(expected, rel=0.03)


def test_positions_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]]).bool()
    expected = torch.tensor([[PAD, PAD, 0, 1, PAD, 2], [0, 1, 2, PAD, PAD, PAD]])
    assert torch.equal(token_positions(IDS, mask, None, None), expected)
    cache = Cache()
    cache.length = 4
    assert torch.equal(token_positions(IDS[:, 4:], mask, None, cache), expected[:, 4:])
    given = torch.arange(10, 16)[None]
    assert torch.equal(token_positions(IDS, mask, given, None), given.expand(2, -1).masked_fill(~mask, PAD))
    assert torch.equal(token_positions(IDS[:, 4:], mask, given[:, 4:], cache), given[:, 4:].expand(2, -1).masked_fill(~mask[:, 4:], PAD))
    assert token_positions(IDS, None, None, None) is None and token_positions(IDS, None, given, None) is given


def test_dropout_acts_in_training_only():
    module, at = _embedding(dropout=0.5), torch.arange(6)[None]
    assert torch.equal(module({"input_ids": IDS}, at), module.tokens(IDS))
    made = module.train()({"input_ids": IDS}, at)
    zero = made == 0
    assert 0 < zero.sum() < made.numel()
    torch.testing.assert_close(made[~zero], 2 * module.tokens(IDS)[~zero])


@pytest.mark.parametrize("flatten", [True, False])
def test_pixels_are_shifted_scaled_and_handed_on(flatten):
    image = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    made = PixelEmbedding(PixelSpec(mean=0.2, std=0.1, flatten=flatten))({"pixel_values": image})
    expected = (image - 0.2) / 0.1
    torch.testing.assert_close(made, expected.reshape(2, 60) if flatten else expected)


@pytest.mark.parametrize(
    ("field", "value"), [("vocab", 0), ("dropout", 1.0), ("std", -1.0), ("norm_eps", -1.0), ("max_length", 0), ("offset", -1), ("size", 0)]
)
def test_impossible_embeddings_are_refused(field, value):
    with pytest.raises(BadInput, match=field):
        TokenSpec(**{field: value})
