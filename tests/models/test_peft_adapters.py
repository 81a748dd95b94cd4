"""A LoRA trained here goes to the peft library and back, and one trained there comes here, with equal logits."""

import json

import pytest
import torch

from layerwise.edit.adapt import load_lora, lora
from layerwise.errors import BadInput
from layerwise.models.hf import export_hf, import_hf
from layerwise.models.load import export
from layerwise.nn.linear import LoRA

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
T = transformers
SMALL = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 40, "num_hidden_layers": 2}
IDS = torch.arange(12).view(2, 6)
BASES = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=40, n_positions=16)),
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**SMALL)),
    "base": lambda: T.BertModel(T.BertConfig(**SMALL)),
}
TARGETS = {"llama": ("q", "v", "gate", "down"), "gpt2": ("up", "down"), "bert": ("q", "k", "up"), "base": ("q", "o")}


def _trained(model, targets, rank=3):
    adapted = lora(model, rank=rank, alpha=5, targets=targets, seed=1)
    generator = torch.Generator().manual_seed(0)
    for module in adapted.modules():
        if isinstance(module, LoRA):
            torch.nn.init.normal_(module.lora_b, std=0.3, generator=generator)
    return adapted


def _scores(model):
    with torch.no_grad():
        out = model(IDS) if not hasattr(model, "spec") else model({"input_ids": IDS})
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("name", sorted(BASES))
def test_ours_goes_there_and_back(name, tmp_path):
    torch.manual_seed(0)
    BASES[name]().save_pretrained(tmp_path / "base")
    base = import_hf(tmp_path / "base")
    adapted = _trained(base, TARGETS[name])
    folder = export(adapted, tmp_path / "adapter", format="peft")
    theirs = peft.PeftModel.from_pretrained(type(BASES[name]()).from_pretrained(tmp_path / "base"), folder).eval()
    with torch.no_grad():
        mine = adapted({"input_ids": IDS})
        made = mine.logits if adapted.head is not None else mine.hidden
        out = theirs(IDS)
        torch.testing.assert_close(made, out.logits if adapted.head is not None else out.last_hidden_state, rtol=0, atol=1e-5)
        back = load_lora(base, folder=str(folder))
        again = back({"input_ids": IDS})
    assert torch.equal(again.hidden, mine.hidden) and back.spec == adapted.spec
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in adapted.parameters()]


def test_theirs_comes_here_with_ranks_of_its_own(tmp_path):
    torch.manual_seed(0)
    network = BASES["llama"]()
    network.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"], rank_pattern={"layers.1.self_attn.q_proj": 4}, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(network, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_lora(import_hf(tmp_path / "base"), folder=str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(ours({"input_ids": IDS}).logits, theirs(IDS).logits, rtol=0, atol=1e-5)
    assert [layer.linears["q"].rank for layer in ours.spec.stack.layers] == [2, 4]


def test_what_cannot_be_is_refused(tmp_path):
    torch.manual_seed(0)
    BASES["gpt2"]().save_pretrained(tmp_path / "gpt2")
    gpt2 = import_hf(tmp_path / "gpt2")
    with pytest.raises(BadInput, match="part of a larger matrix in a gpt2"):
        export(_trained(gpt2, ("q",)), tmp_path / "out", format="peft")
    with pytest.raises(BadInput, match="no low-rank terms"):
        export(gpt2, tmp_path / "out", format="peft")
    folder = export(_trained(gpt2, ("up",)), tmp_path / "adapter", format="peft")
    BASES["llama"]().save_pretrained(tmp_path / "llama")
    with pytest.raises(BadInput, match=r"does not have: transformer\.h\.0\.mlp\.c_fc"):
        load_lora(import_hf(tmp_path / "llama"), folder=str(folder))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(BadInput, match="use_dora"):
        load_lora(gpt2, folder=str(folder))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match="pickle"):
        load_lora(gpt2, folder=str(tmp_path / "pickled"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match="merge them first"):
        export_hf(_trained(gpt2, ("up",)), tmp_path / "out")
