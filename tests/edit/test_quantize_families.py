"""The calibration engine on stacks of other kinds: post-norm encoders, images, LayerNorm."""

import pytest
import torch
import transformers as T

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec


def _built(name, **more):
    data = preset(name)
    data["stack"] |= {"depth": 2, "width": 32, "init_std": 0.2}
    data["stack"]["layer"] |= {"heads": 2, "ffn_width": 64}
    for key, value in more.items():
        data[key] = {**data.get(key, {}), **value}
    return build(model_spec(data)).eval()


@pytest.mark.parametrize("scale", [None, "awq"])
def test_a_post_norm_encoder_and_one_for_images_are_calibrated_too(scale, text, digits):
    bert = _built("bert", embedding={"vocab": 262, "max_length": 32})
    vit = _built("vit", embedding={"channels": 1, "size": (8, 8), "patch": (4, 4)}, head={"classes": 10})
    for model, data in ((bert, text), (vit, digits)):
        rows = data.train.batch(torch.arange(8))
        true = model(rows).logits
        errors = []
        for bits in (2, 4, 8):
            packed = lw.edit.quantize(model, data, bits=bits, scale=scale, propagate=0.5, samples=16)
            errors.append((packed(rows).logits - true).square().mean().item())
        assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3 * true.square().mean().item()


def test_smoke_every_way_of_weighing_tokens_gives_a_model(text):
    model = _built("decoder", embedding={"vocab": 262})
    for tokens in ("attention", "first", "first-last", "norm", "change", "distance", "rare", "random"):
        packed = lw.edit.quantize(model, text, bits=3, tokens=tokens, samples=8)
        assert torch.isfinite(packed(text.train.batch(torch.arange(2))).logits).all()


SMALL = {"vocab_size": 262, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG = {"max_position_embeddings": 64}
GROUPED = {**SMALL, **LONG, "num_key_value_heads": 2}
NORMED = "RMSNorm before each branch"
DECODERS = {
    "Llama": (GROUPED, None),
    "Mistral": (GROUPED, None),
    "Ministral": ({**GROUPED, "head_dim": 16}, None),
    "Qwen2": (GROUPED, None),
    "Qwen3": ({**GROUPED, "head_dim": 32}, None),
    "Gemma": ({**GROUPED, "head_dim": 16}, None),
    "GPT2": ({"vocab_size": 262, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}, NORMED),
    "GPTNeoX": ({**SMALL, **LONG, "eos_token_id": 2}, NORMED),
    "OPT": ({"vocab_size": 262, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, **LONG}, NORMED),
}


def _theirs(name, config, kind, folder):
    torch.manual_seed(0)
    model = getattr(T, name + kind)(getattr(T, name + "Config")(**config, initializer_range=0.15)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_family_is_quantized_exported_and_rotated_or_told_why_not(name, text, tmp_path):
    config, refused = DECODERS[name]
    _theirs(name, config, "LMHeadModel" if name == "GPT2" else "ForCausalLM", tmp_path / "theirs")
    model = lw.load(tmp_path / "theirs")
    rows = {"input_ids": text.train.batch(torch.arange(2))["input_ids"]}
    with torch.no_grad():
        true, errors = model(rows).logits, []
        for bits in (2, 4, 8):
            packed = lw.edit.quantize(model, text, bits=bits, group=32, scale="awq", propagate=0.5, tokens="attention", samples=8)
            errors.append(((packed(rows).logits - true).square().mean() / true.square().mean()).item())
        assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3
        back = lw.load(lw.export(packed, tmp_path / "gptq", format="gptq"))
        assert torch.equal(back(rows).logits, packed(rows).logits)
        # What transformers makes of the dequantized matrices is what the packed ones compute.
        plain = T.AutoModelForCausalLM.from_pretrained(lw.export(lw.edit.merge(back), tmp_path / "plain")).eval()
        torch.testing.assert_close(plain(rows["input_ids"]).logits, packed(rows).logits, rtol=1e-3, atol=1e-3)
        if refused is None:
            double = lw.load(tmp_path / "theirs", dtype=torch.float64)
            torch.testing.assert_close(lw.edit.rotate(double)(rows).logits, double(rows).logits, rtol=1e-8, atol=1e-8)
        else:
            with pytest.raises(BadInput, match=refused):
                lw.edit.quantize(model, text, rotate="hadamard")


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("Roberta", {"pad_token_id": 1}, None),
        ("Electra", {}, None),
        ("Albert", {}, "weights of their own"),
        ("T5", {"d_model": 64}, "one stack"),
    ],
)
def test_encoders_are_walked_too_and_stacks_that_cannot_be_are_refused(name, more, reason, text, tmp_path):
    config = {"vocab_size": 262, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4} if name == "T5" else {**SMALL, **LONG}
    _theirs(name, config | more, "Model", tmp_path / "theirs")
    model = lw.load(tmp_path / "theirs")
    if reason is not None:
        with pytest.raises(BadInput, match=reason):
            lw.edit.quantize(model, text)
        return
    rows = {"input_ids": text.train.batch(torch.arange(2))["input_ids"] + 2}
    with torch.no_grad():
        made = lw.edit.quantize(model, text, bits=8, samples=8, scale="awq", propagate=0.5)(rows).hidden
        torch.testing.assert_close(made, model(rows).hidden, rtol=0.05, atol=0.1)
