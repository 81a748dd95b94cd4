"""The Llama family, exact in both directions."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from layerwise.errors import BadInput
from layerwise.infer.generate import generate
from layerwise.models.hf import export_hf, family_for, import_hf
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec

IDS = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(0))
SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
CASES = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 2}),
    "llama-biased-tied": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "rope_theta": 5000.0}),
    "llama-wide-heads": (transformers.LlamaConfig, {"head_dim": 16, "num_key_value_heads": 1}),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 2, "sliding_window": 4}),
    "mistral-full": (transformers.MistralConfig, {"num_key_value_heads": 4, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2}),
    "qwen2-windows": (transformers.Qwen2Config, {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
}  # fmt: skip
MATTERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
    "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "layer_types", "rope_parameters", "model_type",
)  # fmt: skip


@pytest.fixture(params=sorted(CASES))
def theirs(request, tmp_path):
    make, more = CASES[request.param]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(make(**SMALL, **more), attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(tmp_path / "theirs")
    return model


def _in_double(model):
    """Let a transformers model compute in float64 all through: its norms and eager softmax go down to float32 otherwise."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    model.double().set_attn_implementation("sdpa")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_layer_and_the_logits_are_equal(theirs, tmp_path, dtype, tolerance):
    ours = import_hf(tmp_path / "theirs", dtype=dtype)
    if dtype == torch.float64:
        _in_double(theirs)
    with torch.no_grad():
        reference = theirs(IDS, output_hidden_states=True)
    made = ours({"input_ids": IDS}, hiddens=True)
    scale = max(float(h.abs().max()) for h in reference.hidden_states)
    for a, b in zip(made.hiddens[:-1], reference.hidden_states[1:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(scale, 1))
    torch.testing.assert_close(made.hidden, reference.hidden_states[-1], rtol=0, atol=tolerance * max(scale, 1))
    torch.testing.assert_close(made.logits, reference.logits, rtol=0, atol=tolerance * max(float(reference.logits.abs().max()), 1))


def test_there_and_back_is_the_identity(theirs, tmp_path):
    back = export_hf(import_hf(tmp_path / "theirs"), tmp_path / "back", max_length=theirs.config.max_position_embeddings)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "back"))
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
    old, new = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("theirs", "back"))
    # transformers keeps an unused window; a model without one says so here.
    windowed = old.get("use_sliding_window", True)
    for key in MATTERS:
        if key == "model_type" and old[key] == "mistral" and old["sliding_window"] is None:
            continue  # a Mistral without a window is a Llama, and is written as one
        if key in old and (windowed or key != "sliding_window"):
            assert new.get(key) == old[key], key
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager").eval()
    assert torch.equal(loaded(IDS).logits, theirs(IDS).logits)


def test_greedy_generation_is_equal_token_for_token(theirs, tmp_path):
    ours = import_hf(tmp_path / "theirs", dtype=torch.float64)
    _in_double(theirs)
    expected = theirs.generate(IDS, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(generate(ours, IDS, new=12), expected)


def test_left_padded_generation_equals_theirs_without_padding(theirs, tmp_path):
    ours = import_hf(tmp_path / "theirs", dtype=torch.float64)
    _in_double(theirs)
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], dim=1)
    mask = (ids != 0).long()
    expected = theirs.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(generate(ours, ids, new=6, attention_mask=mask)[:, 3:], expected)


def _decoder(**layer):
    data = preset("decoder")
    data["stack"] |= {"depth": 2, "width": 32}
    data["stack"]["layer"] |= {"heads": 4, **layer}
    data["embedding"] = {"vocab": 262}
    return build(model_spec(data))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_our_decoder_and_its_tokenizer_load_in_transformers(text, tmp_path, dtype):
    model = _decoder(kv_heads=2).eval()
    folder = export_hf(model, tmp_path / "out", tokenizer=text.tokenizer, dtype=dtype, max_length=32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert theirs.dtype == (dtype or torch.float32)
    if dtype is None:
        torch.testing.assert_close(theirs(IDS).logits, model({"input_ids": IDS}).logits, rtol=1e-5, atol=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = "Grüße, a b\n\tc"
    assert tokenizer(words)["input_ids"] == text.tokenizer.encode(words).ids and tokenizer.decode(tokenizer(words)["input_ids"]) == words
    assert theirs.config.eos_token_id == text.eos_id == tokenizer.eos_token_id


def test_shards(tmp_path):
    model = _decoder()
    folder = export_hf(model, tmp_path / "out", shard_bytes=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    again = import_hf(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "checksums.json").unlink()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../../secret.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="outside its folder"):
        import_hf(folder)


def _changed(folder, config=None, tensors=None):
    """The folder as somebody else might have written it: without our checksums."""
    (folder / "checksums.json").unlink(missing_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if tensors:
        held = load_file(folder / "model.safetensors")
        tensors(held)
        save_file(held, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"model_type": "llamma"}, None, r"'llamma' checkpoints are not known.*Did you mean 'llama'.*mistral"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, None, "rotary scaling"),
        ({"hidden_act": "relu"}, None, "hidden_act is 'relu'"),
        ({"num_hidden_layers": None}, None, r"config\.json"),
        ({}, lambda t: t.pop("model.norm.weight"), r"missing model\.norm\.weight"),
        ({}, lambda t: t.update({"model.extra": torch.ones(2)}), r"unexpected model\.extra"),
        ({}, lambda t: t.update({"lm_head.weight": torch.ones(2, 2)}), r"lm_head\.weight has shape|head\.weight is"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, config, tensors, message):
    folder = export_hf(_decoder(), tmp_path / "out")
    _changed(folder, config, tensors)
    with pytest.raises(BadInput, match=message):
        import_hf(folder)


def test_remote_code_is_never_run(tmp_path):
    folder = export_hf(_decoder(), tmp_path / "out")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    _changed(folder, {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    assert import_hf(folder).stack.depth == 2


@pytest.mark.parametrize(
    ("layer", "obstacle"),
    [
        ({"placement": "post"}, "layer 0 has placement 'post'"),
        ({"ffn": "gelu"}, "ffn 'gelu'"),
        ({"position": "alibi"}, "position 'alibi'"),
        ({"norm": "layernorm"}, "norm 'layernorm'"),
    ],
)
def test_models_that_no_family_holds_are_refused_with_the_reason(layer, obstacle):
    with pytest.raises(BadInput, match=obstacle):
        family_for(_decoder(**layer).spec)


def test_layernorm_scaled_models_are_llamas_too(tmp_path):
    model = _decoder(placement="lns").eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export_hf(model, tmp_path / "out")).eval()
    torch.testing.assert_close(theirs(IDS).logits, model({"input_ids": IDS}).logits, rtol=1e-5, atol=1e-6)
