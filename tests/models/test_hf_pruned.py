"""Pruned widths of Hugging Face models: what goes back out, and what only our own format holds."""

from pathlib import Path

import pytest
import torch
import transformers
from hf_reference import random_model

import layerwise as lw
from layerwise.edit.prune.structured import prune_width
from layerwise.errors import BadInput
from layerwise.models.hf import export_hf, import_hf

SMALL = {
    "vocab_size": 270,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CAUSAL = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma": (transformers.GemmaConfig, {"num_key_value_heads": 2, "head_dim": 8}),
}
IDS = torch.arange(20).reshape(2, 10)


def _imported(make, config, tmp_path):
    random_model(make, config).save_pretrained(tmp_path / "theirs")
    return import_hf(tmp_path / "theirs").eval()


@pytest.mark.parametrize("family", CAUSAL)
def test_decoders_pruned_alike_go_back_out(family, text, tmp_path):
    make, more = CAUSAL[family]
    model = _imported(transformers.AutoModelForCausalLM.from_config, make(**SMALL, **more), tmp_path)
    pruned = prune_width(model, text, keep=0.5, steps=4, samples=8)
    assert {(s.heads, s.kv_heads, s.ffn_width) for s in pruned.spec.stack.layers} == {(2, 1, 24)}
    export_hf(pruned, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.num_key_value_heads == 1 and theirs.config.intermediate_size == 24
    torch.testing.assert_close(theirs(IDS).logits, pruned({"input_ids": IDS}).logits, rtol=1e-4, atol=1e-4)


def test_widths_that_differ_are_refused_by_the_first_layer_and_kept_in_our_format(text, tmp_path):
    make, more = CAUSAL["llama"]
    model = _imported(transformers.AutoModelForCausalLM.from_config, make(**SMALL, **more), tmp_path)
    pruned = prune_width(model, text, keep=[1.0, 1.0, 0.5], samples=8)
    with pytest.raises(
        BadInput, match=r"layer 2 has heads 2 and layer 0 has 4; a llama cannot have both.*own format \(export: layerwise\)"
    ):
        export_hf(pruned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    lw.save(pruned, tmp_path / "ours")
    back = lw.load(tmp_path / "ours").eval()
    assert back.spec == pruned.spec and torch.equal(back({"input_ids": IDS}).logits, pruned({"input_ids": IDS}).logits)


def test_bert_gives_up_channels_and_its_heads_only_in_our_format(text, tmp_path):
    model = _imported(transformers.BertForMaskedLM, transformers.BertConfig(**SMALL), tmp_path)
    pruned = prune_width(model, text, keep=0.5, parts="ffn", objective="masked-lm", steps=4, samples=8)
    export_hf(pruned, tmp_path / "out")
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.intermediate_size == 24
    torch.testing.assert_close(theirs(IDS).logits, pruned({"input_ids": IDS}).logits, rtol=1e-4, atol=1e-4)
    both = prune_width(model, text, keep=0.5, objective="masked-lm", steps=4, samples=8)
    assert {(s.heads, s.ffn_width) for s in both.spec.stack.layers} == {(2, 24)}
    with pytest.raises(BadInput, match="layer 0 has head"):  # their head size is hidden size / heads
        export_hf(both, tmp_path / "no")


def test_gpt2_gives_up_channels(text, tmp_path):
    config = transformers.GPT2Config(vocab_size=270, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48)
    model = _imported(transformers.GPT2LMHeadModel, config, tmp_path)
    pruned = prune_width(model, text, keep=0.25, parts="ffn", steps=4, samples=8)
    export_hf(pruned, tmp_path / "out")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(theirs(IDS).logits, pruned({"input_ids": IDS}).logits, rtol=1e-4, atol=1e-4)


def test_vit_gives_up_channels_by_magnitude(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    model = _imported(transformers.ViTForImageClassification, config, tmp_path)
    pruned = prune_width(model, keep=0.5, parts="ffn", by="magnitude")
    export_hf(pruned, tmp_path / "out")
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(images).logits, pruned({"pixel_values": images}).logits, rtol=1e-4, atol=1e-4)


def test_minilm_with_fewer_channels_goes_back_out(minilm: Path, tmp_path):
    model = lw.load(minilm).eval()
    pruned = prune_width(model, keep=0.8, parts="ffn", by="magnitude")
    export_hf(pruned, tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.intermediate_size == 1228 == int(0.8 * 1536)
    ids = {"input_ids": torch.tensor([[101, 7592, 2088, 1010, 2129, 2024, 2017, 102]])}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**ids).last_hidden_state, pruned(ids).hidden, rtol=1e-3, atol=1e-3)
        assert torch.nn.functional.cosine_similarity(pruned(ids).pooled, model(ids).pooled).item() > 0.8
