"""Random small members of the Llama family: the same numbers as transformers' at every layer, and back to the same file."""

import json
import random

import pytest
import torch
import transformers as T
from hf_reference import in_double, random_model, tensors_of

from layerwise.data.spec import TokenizerSpec
from layerwise.data.tokenizer import make_tokenizer
from layerwise.errors import BadInput
from layerwise.infer.generate import generate
from layerwise.models.checkpoint import load, save
from layerwise.models.hf import export_hf, import_hf
from layerwise.models.load import described, export, load_any
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec

CONFIGS = {"llama": T.LlamaConfig, "mistral": T.MistralConfig, "qwen2": T.Qwen2Config, "qwen3": T.Qwen3Config}
VOCAB = 61
IDS = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))


def _drawn(family, seed):
    """A small config with everything drawn that the family lets one choose."""
    draw = random.Random(f"{family}-{seed}")
    kv, group, head_dim, depth = draw.choice([1, 2]), draw.choice([1, 2, 3]), draw.choice([4, 6, 10]), draw.choice([1, 2, 4])
    heads = kv * group
    free = family != "qwen2" and draw.random() < 0.5
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": heads * (draw.choice([2, 5, 8]) if free else head_dim),
        "intermediate_size": draw.choice([7, 24, 33]),
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([100.0, 10_000.0, 500_000.0])},
        "tie_word_embeddings": draw.random() < 0.5,
        "max_position_embeddings": draw.choice([64, 100]),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family != "qwen2":
        fields["head_dim"] = head_dim
    if family in ("llama", "qwen3"):
        fields["attention_bias"] = draw.random() < 0.5
    if family == "llama":
        fields["mlp_bias"] = draw.random() < 0.5
    if family == "mistral":
        fields["sliding_window"] = draw.choice([1, 3, 6])
    if family.startswith("qwen") and seed % 2:
        kinds = [draw.choice(["full_attention", "sliding_attention"]) for _ in range(depth - 1)]
        fields |= {"use_sliding_window": True, "sliding_window": draw.choice([2, 5]), "layer_types": [*kinds, "sliding_attention"]}
    return CONFIGS[family](**fields)


@pytest.fixture(params=[(family, seed) for family in CONFIGS for seed in range(4)], ids=lambda p: f"{p[0]}-{p[1]}")
def theirs(request, tmp_path):
    model = random_model(T.AutoModelForCausalLM.from_config, _drawn(*request.param), request.param[1])
    model.save_pretrained(tmp_path / "theirs")
    return model


def _compare(model, ours, tolerance):
    with torch.no_grad():
        reference = model(IDS, output_hidden_states=True)
        made = ours({"input_ids": IDS}, hiddens=True)
    assert len(made.hiddens) == len(reference.hidden_states) - 1
    # transformers hands out the last layer's output after the final norm.
    pairs = [*zip(made.hiddens[:-1], reference.hidden_states[1:-1], strict=True), (made.hidden, reference.hidden_states[-1])]
    worst = 0.0
    for a, b in [*pairs, (made.logits, reference.logits)]:
        worst = max(worst, (a - b).abs().max().item() / max(1.0, b.abs().max().item()))
    assert worst <= tolerance


def test_every_layer_and_the_logits_equal_theirs_and_so_does_what_is_generated(theirs, tmp_path):
    _compare(theirs, import_hf(tmp_path / "theirs"), 1e-5)
    ours = import_hf(tmp_path / "theirs", dtype=torch.float64)
    _compare(in_double(theirs), ours, 1e-10)
    # Without their cache: with a window of one it keeps every key instead of none (transformers 5.24).
    expected = theirs.generate(IDS, max_new_tokens=9, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(generate(ours, IDS, new=9), expected)


def test_there_and_back_through_our_own_format_is_the_identity(theirs, tmp_path):
    ours = load(save(import_hf(tmp_path / "theirs"), tmp_path / "own"))
    back = export_hf(ours, tmp_path / "back")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(back)
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) and t.dtype == after[n].dtype for n, t in before.items())
    old, new = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("theirs", "back"))
    assert {k: v for k, v in new.items() if k in old} == {k: v for k, v in old.items() if k != "transformers_version"}
    assert described(back) == ours.spec
    again = T.AutoModelForCausalLM.from_pretrained(back).eval()
    with torch.no_grad():
        assert type(again) is type(theirs) and torch.equal(again(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_on_the_way(tmp_path, dtype):
    model = random_model(T.AutoModelForCausalLM.from_config, _drawn("llama", 2)).to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    ours = import_hf(tmp_path / "theirs")
    assert {t.dtype for t in ours.state_dict().values()} == {dtype}
    back = export_hf(ours, tmp_path / "back")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(back)
    assert all(torch.equal(t, after[n]) for n, t in before.items()) and {t.dtype for t in after.values()} == {dtype}
    assert T.AutoModelForCausalLM.from_pretrained(back, dtype="auto").dtype == dtype


# Folders


def _small(tmp_path, **fields):
    config = _drawn("llama", 1)
    config.tie_word_embeddings = False
    model = random_model(T.AutoModelForCausalLM.from_config, config)
    model.save_pretrained(tmp_path / "theirs", **fields)
    return model, tmp_path / "theirs"


def test_their_shards_are_read_and_ours_are_read_by_them(tmp_path):
    model, folder = _small(tmp_path, max_shard_size="5KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    ours = import_hf(folder)
    for bytes_ in (1, 4_000, 10**9):
        back = export_hf(ours, tmp_path / f"back-{bytes_}", shard_bytes=bytes_)
        files = list(back.glob("*.safetensors"))
        assert (len(files) > 1) == (bytes_ < 10**9)
        again = T.AutoModelForCausalLM.from_pretrained(back).eval()
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(import_hf(back).state_dict().values(), ours.state_dict().values(), strict=True))
        if bytes_ == 1:
            assert len(files) == len(model.state_dict()), "a tensor larger than a shard has one for itself"
            index = json.loads((back / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in model.state_dict().values())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update({"lm_head.weight": "../secret.safetensors"}),
        lambda m: m.update({"lm_head.weight": "/etc/passwd"}),
        lambda m: m.update({"lm_head.weight": "sub/a.safetensors"}),
        lambda m: m.update({"lm_head.weight": "weights.bin"}),
        lambda m: m.update({"lm_head.weight": ".."}),
    ],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, change):
    _, folder = _small(tmp_path, max_shard_size="5KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(BadInput, match="names a file outside its folder, or one that is not safetensors"):
        import_hf(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', b"\xff\xfe"])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    _, folder = _small(tmp_path, max_shard_size="5KB")
    (folder / "model.safetensors.index.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match="is not an index of shards"):
        import_hf(folder)


def test_a_shard_that_is_gone_or_cut_is_named(tmp_path):
    _, folder = _small(tmp_path, max_shard_size="5KB")
    first = sorted(folder.glob("model-*.safetensors"))[0]
    content = first.read_bytes()
    first.write_bytes(content[:-4])
    with pytest.raises(BadInput, match=f"{first.name} cannot be read"):
        import_hf(folder)
    first.unlink()
    with pytest.raises(BadInput, match=f"{first.name} cannot be read"):
        import_hf(folder)


def test_remote_code_is_never_run_nor_handed_on(tmp_path):
    _, folder = _small(tmp_path)
    for name in ("configuration_evil.py", "modeling_evil.py", "__init__.py"):
        (folder / name).write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    path = folder / "config.json"
    evil = {"auto_map": {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | evil))
    back = export_hf(load_any(folder), tmp_path / "back")
    assert not (tmp_path / "ran").exists() and not list(back.glob("*.py"))
    assert "auto_map" not in json.loads((back / "config.json").read_text())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, r"'mamba' checkpoints are not known here.*Families: .*llama.*mistral.*qwen2.*qwen3"),
        ({"model_type": ["llama"]}, "not a model's config|not known"),
        ({"model_type": None}, "not a model's config|not known"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rotary scaling .*yarn.* is not known here; .*linear",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling .*dynamic"),
        ({"quantization_config": {"bits": 4}}, "weights are quantized"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification has a head that is not known"),
        ({"hidden_size": "wide"}, r"config\.json"),
        ({"num_hidden_layers": 0}, r"missing none, unexpected model\.layers\.0"),
        ({"num_attention_heads": 0}, "heads must be at least 1"),
        ({"num_key_value_heads": 100}, r"multiple|config\.json"),
        ({"num_hidden_layers": 80}, r"missing model\.layers\.\d+.* and \d+ more"),
        ({"intermediate_size": 5}, r"has shape .*; the config makes it"),
    ],
)
def test_configs_that_cannot_be_used_are_refused_clearly(tmp_path, config, message):
    _, folder = _small(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(BadInput, match=message):
        load_any(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', b"\xff\xfe"])
def test_configs_that_are_none_are_refused(tmp_path, content):
    _, folder = _small(tmp_path)
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=r"config\.json is not a model's config"):
        load_any(folder)


# Our models


def _decoder(**layer):
    data = preset("decoder")
    data["stack"] |= {"depth": 3, "width": 24, "init_std": 0.3}
    data["stack"]["layer"] |= {"heads": 4, **layer}
    data["embedding"] = {"vocab": 300}
    return build(model_spec(data), 5).eval()


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ({}, T.LlamaForCausalLM),
        ({"kv_heads": 2, "rope_theta": 500.0}, T.LlamaForCausalLM),
        ({"window": 3}, T.MistralForCausalLM),
        ({"qkv_bias": True}, T.Qwen2ForCausalLM),
        ({"qk_norm": True, "head_dim": 8}, T.Qwen3ForCausalLM),
        ({"qkv_bias": True, "out_bias": True, "ffn_bias": True}, T.LlamaForCausalLM),
    ],
)
def test_a_decoder_of_ours_loads_there_with_equal_logits(tmp_path, layer, kind):
    model = _decoder(**layer)
    folder = export(model, tmp_path / "out")
    theirs = T.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert type(theirs) is kind
    _compare(theirs, model, 1e-5)
    again = import_hf(folder)
    assert again({"input_ids": IDS}).logits.equal(model({"input_ids": IDS}).logits)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "bytes"])
def test_an_exported_tokenizer_loads_there_and_encodes_alike(tmp_path, kind):
    texts = [f"Number {i}: the Grüße of {i * 7} foxes and crows." for i in range(30)]
    tokenizer = make_tokenizer(TokenizerSpec(kind, vocab=300), texts)
    before = tokenizer.to_str()
    folder = export_hf(_decoder(), tmp_path / "out", tokenizer=tokenizer)
    assert tokenizer.to_str() == before, "the tokenizer handed in stays as it was"
    theirs = T.AutoTokenizer.from_pretrained(folder)
    for text in [*texts[:5], "", "  two  blanks\n", "狐 <eos> <mask>"]:
        ids = tokenizer.encode(text).ids
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == tokenizer.decode(ids, skip_special_tokens=False)
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.mask_token_id, theirs.unk_token_id) == (0, 1, 3, 2)
    config = T.AutoConfig.from_pretrained(folder)
    assert (config.pad_token_id, config.eos_token_id) == (0, 1)
    batch = theirs(texts[:3], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == batch["attention_mask"].shape


def test_a_post_norm_model_is_told_what_stands_in_its_way_and_nothing_is_written(tmp_path):
    model = _decoder(placement="post")
    with pytest.raises(BadInput, match=r"no Hugging Face family can hold this model: .*placement 'post'.*own format.*Families: llama"):
        export_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
