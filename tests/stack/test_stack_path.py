"""Paths through networks of other libraries: equal to our own stack on the same weights, refused where they mean nothing."""

import pytest
import torch
from torch import nn

from layerwise.errors import BadInput
from layerwise.models.hf import import_hf
from layerwise.stack.depth import view

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40, "num_hidden_layers": 4}
IDS = torch.arange(12).view(2, 6)


def _network(name):
    import transformers as t

    torch.manual_seed(0)
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SMALL)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_head=2, n_layer=4, vocab_size=40, n_positions=16)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SMALL)),
        "t5": lambda: t.T5Model(t.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40)),
        "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"})),
    }[name]().eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("path", [[0, 2, 3], [0, 1, 1, 2, 3], [3, 0], [], [2]])
def test_a_path_through_theirs_equals_the_path_through_ours(name, path, tmp_path):
    theirs = _network(name)
    theirs.save_pretrained(tmp_path)
    ours = import_hf(tmp_path)
    with torch.no_grad():
        expected = ours({"input_ids": IDS}, path=path).logits
        torch.testing.assert_close(view(theirs).run({"input_ids": IDS}, path=path).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(view(ours).run({"input_ids": IDS}, path=path).logits, expected, rtol=0, atol=0)


def test_the_whole_path_changes_nothing_and_nothing_is_left_behind():
    falcon = _network("falcon")
    before = falcon(IDS, use_cache=False).logits
    made = view(falcon).run({"input_ids": IDS}, path=range(4))
    assert torch.equal(made.logits, before) and torch.equal(view(falcon).run({"input_ids": IDS}).logits, before)
    assert not any("forward" in layer.__dict__ for layer in view(falcon).layers)


def test_gradients_go_along_the_path():
    bert = _network("bert")
    view(bert).run({"input_ids": IDS}, path=[0, 0, 2]).logits.sum().backward()
    touched = [any(p.grad is not None for p in layer.parameters()) for layer in view(bert).layers]
    assert touched == [True, False, True, False]


class _Widening(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 8), nn.ReLU())])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_what_cannot_be_is_refused_with_the_reason():
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    with pytest.raises(BadInput, match=r"between layers 0 and 1 more is handed on than the stream"):
        view(_network("t5")).run(batch, path=[0, 2])
    with pytest.raises(BadInput, match=r"layer 7; this network has 4 layers"):
        view(_network("llama")).run({"input_ids": IDS}, path=[0, 7])
    widening = _Widening()
    assert view(widening).run({"x": torch.rand(2, 4)}, path=[0, 0, 1]).shape == (2, 8)
    with pytest.raises(BadInput, match=r"layer 1 would get \(2, 8\); it takes \(2, 4\)"):
        view(widening).run({"x": torch.rand(2, 4)}, path=[0, 1, 1])
    with pytest.raises(BadInput, match=r"ends with \(2, 4\)"):
        view(widening).run({"x": torch.rand(2, 4)}, path=[0])
