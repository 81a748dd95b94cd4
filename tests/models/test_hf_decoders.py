"""Decoders beside the plain Llama: every layer, generation, padding, and the way there and back."""

import dataclasses

import pytest
import torch
import transformers as T
from hf_reference import SMALL, change_config, config_of, goes_and_comes_back, in_double, random_model, tensors_of

from layerwise.errors import BadInput
from layerwise.infer.generate import generate
from layerwise.models.hf import export_hf, family_for, import_hf
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.cache import Cache
from layerwise.stack.surgery import keep, repeat

LONG = {"max_position_embeddings": 64}
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
NEOX = {**SMALL, **LONG, "hidden_size": 64, "eos_token_id": 2}
OPT = {"vocab_size": 60, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, **LONG}
GEMMA = {**SMALL, **LONG, "num_key_value_heads": 2, "head_dim": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
CASES = {
    "gpt2": (T.GPT2LMHeadModel, T.GPT2Config(**GPT2)),
    "gpt2-untied-wide-relu": (T.GPT2LMHeadModel, T.GPT2Config(**GPT2, n_inner=40, tie_word_embeddings=False, activation_function="relu")),
    "gpt_neox": (T.GPTNeoXForCausalLM, T.GPTNeoXConfig(**NEOX)),
    "gpt_neox-sequential-half": (
        T.GPTNeoXForCausalLM,
        T.GPTNeoXConfig(**NEOX, use_parallel_residual=False, rotary_pct=0.5, attention_bias=False, hidden_act="gelu_new"),
    ),
    "gpt_neox-all-rotated-tied": (T.GPTNeoXForCausalLM, T.GPTNeoXConfig(**NEOX, rotary_pct=1.0, tie_word_embeddings=True)),
    "opt": (T.OPTForCausalLM, T.OPTConfig(**OPT)),
    "opt-after": (T.OPTForCausalLM, T.OPTConfig(**OPT, do_layer_norm_before=False, enable_bias=False)),
    "opt-no-last-norm": (T.OPTForCausalLM, T.OPTConfig(**OPT, _remove_final_layer_norm=True, tie_word_embeddings=False)),
    "gemma": (T.GemmaForCausalLM, T.GemmaConfig(**GEMMA)),
    "gemma-biased-untied": (T.GemmaForCausalLM, T.GemmaConfig(**GEMMA, attention_bias=True, tie_word_embeddings=False)),
    "ministral": (
        T.MinistralForCausalLM,
        T.MinistralConfig(
            **SMALL,
            **LONG,
            num_key_value_heads=2,
            head_dim=8,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            sliding_window=4,
        ),
    ),
    "qwen3-windows": (
        T.Qwen3ForCausalLM,
        T.Qwen3Config(
            **SMALL,
            **LONG,
            num_key_value_heads=2,
            head_dim=16,
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "llama-linear": (
        T.LlamaForCausalLM,
        T.LlamaConfig(**SMALL, **LONG, rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 777.0}),
    ),
    "llama-llama3": (T.LlamaForCausalLM, T.LlamaConfig(**SMALL, **LONG, head_dim=32, rope_parameters=LLAMA3)),
}
IDS = torch.randint(3, 60, (3, 14), generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([14, 8, 11])


def _padded(side):
    order = torch.arange(14)
    mask = order < REAL[:, None] if side == "right" else order >= 14 - REAL[:, None]
    return IDS.masked_fill(~mask, 1), mask


@pytest.fixture(params=sorted(CASES))
def theirs(request, tmp_path):
    model = random_model(*CASES[request.param])
    model.save_pretrained(tmp_path / "theirs")
    return model


def _in(theirs, folder, dtype):
    """Their model and ours, both in a dtype. What transformers computes when a model is made is computed in it too."""
    if dtype == torch.float64:
        theirs = in_double(type(theirs).from_pretrained(folder, dtype=dtype).eval())
    return theirs, import_hf(folder, dtype=dtype)


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_layer_and_the_logits_are_equal(theirs, tmp_path, dtype, tolerance, side):
    theirs, ours = _in(theirs, tmp_path / "theirs", dtype)
    ids, mask = _padded(side) if side != "none" else (IDS, torch.ones_like(IDS).bool())
    batch = {"input_ids": ids} if side == "none" else {"input_ids": ids, "attention_mask": mask.long()}
    positions = {} if side == "none" else {"position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        reference = theirs(**batch, **positions, output_hidden_states=True)
        made = ours(batch, hiddens=True)
    hiddens = [*made.hiddens[:-1], made.hidden]
    assert len(hiddens) == len(reference.hidden_states) - 1
    for a, b in zip(hiddens, reference.hidden_states[1:], strict=True):
        torch.testing.assert_close(a[mask], b[mask], rtol=0, atol=tolerance * max(1, float(b[mask].abs().max())))
    logits = reference.logits[mask]
    torch.testing.assert_close(made.logits[mask], logits, rtol=0, atol=tolerance * max(1, float(logits.abs().max())))


def test_greedy_generation_is_equal_token_for_token(theirs, tmp_path):
    theirs, ours = _in(theirs, tmp_path / "theirs", torch.float64)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(IDS, max_new_tokens=16, do_sample=False, pad_token_id=1)
    assert torch.equal(generate(ours, IDS, new=16), expected)
    cache, ids, fed = Cache(), IDS, IDS
    with torch.no_grad():
        for _ in range(16):
            fed = ours({"input_ids": fed}, cache=cache).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, fed], dim=1)
    assert torch.equal(ids, expected)


def test_generation_from_left_padded_prompts_is_equal(theirs, tmp_path):
    theirs, ours = _in(theirs, tmp_path / "theirs", torch.float64)
    theirs.generation_config.eos_token_id = None
    ids, mask = _padded("left")
    expected = theirs.generate(ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, pad_token_id=1)
    assert torch.equal(generate(ours, ids, new=12, attention_mask=mask.long()), expected)


@pytest.mark.parametrize("through_ours", [False, True])
def test_there_and_back_is_the_identity(theirs, tmp_path, through_ours):
    loaded = goes_and_comes_back(tmp_path / "theirs", T.AutoModelForCausalLM, through_ours)
    assert type(loaded) is type(theirs)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, theirs(IDS).logits)


def test_what_was_cut_goes_out_as_what_it_is(theirs, tmp_path):
    """After an edit the config is written anew; transformers computes with it what we do."""
    model = import_hf(tmp_path / "theirs")
    shorter = model.with_stack(keep(model.stack, [0, 2]))
    loaded, info = T.AutoModelForCausalLM.from_pretrained(export_hf(shorter, tmp_path / "back"), output_loading_info=True)
    assert type(loaded) is type(theirs) and not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(IDS).logits, shorter({"input_ids": IDS}).logits, rtol=1e-4, atol=1e-4)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(loaded.config, key) == getattr(theirs.config, key)


def test_the_description_alone_is_enough(theirs, tmp_path):
    """A model of the same description that came from nowhere goes out into the same family."""
    model = import_hf(tmp_path / "theirs")
    fresh = build(model.spec).eval()
    fresh.load_state_dict(model.state_dict())
    loaded, info = T.AutoModelForCausalLM.from_pretrained(export_hf(fresh, tmp_path / "back"), output_loading_info=True)
    assert type(loaded) is type(theirs) and not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_write_names_every_key_that_read_looks_at(theirs, tmp_path):
    """Otherwise a key of an old config would stay in force after the model has changed."""

    class Watched(dict):
        seen: set = set()  # noqa: RUF012

        def get(self, key, default=None):
            self.seen.add(key)
            return super().get(key, default)

        def __getitem__(self, key):
            self.seen.add(key)
            return super().__getitem__(key)

    model = import_hf(tmp_path / "theirs")
    family = family_for(model.spec)
    written = family.write(model.spec)
    watched = Watched(written)
    watched.seen = set()
    family.read(watched, True)
    former = {"rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base", "position_embedding_type"}
    assert watched.seen - former <= set(written)


def _decoder(layer=None, **parts):
    data = preset("decoder")
    data["stack"] |= {"depth": 3, "width": 32, "init_std": 0.2, **parts.pop("stack", {})}
    data["stack"]["layer"] |= {"heads": 4, **(layer or {})}
    return build(model_spec({**data, "embedding": {"vocab": 60}, **parts})).eval()


GPT2_LAYER = {
    "position": "none",
    "ffn": "gelu_tanh",
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "qkv_bias": True,
    "out_bias": True,
    "ffn_bias": True,
}
BUILT = {
    "llama": _decoder,
    "qwen2": lambda: _decoder({"qkv_bias": True}),
    "qwen3": lambda: _decoder({"qk_norm": True, "kv_heads": 2}),
    "mistral": lambda: _decoder({"window": 5}),
    "ministral": lambda: _decoder(stack={"overrides": {"::2": {"window": 5}}}),
    "gemma": lambda: _decoder(
        {"ffn": "geglu_tanh", "norm": "rmsnorm_zero"},
        embedding={"vocab": 60, "scale": 32**0.5},
        head={"tie": True},
    ),
    "gpt2": lambda: _decoder(GPT2_LAYER, embedding={"vocab": 60, "position": "learned", "max_length": 32}, head={"tie": True}),
    "gpt_neox": lambda: _decoder({**GPT2_LAYER, "position": "rotary", "rotary_dim": 4, "parallel": True}),
    "opt": lambda: _decoder(
        {**GPT2_LAYER, "ffn": "relu"},
        embedding={"vocab": 60, "position": "learned", "max_length": 32, "offset": 2},
        head={"tie": True},
    ),
}


@pytest.mark.parametrize("name", sorted(BUILT))
def test_models_built_here_load_there(name, tmp_path):
    model = BUILT[name]()
    assert family_for(model.spec).name == name
    loaded, info = T.AutoModelForCausalLM.from_pretrained(export_hf(model, tmp_path / "out"), output_loading_info=True)
    assert loaded.config.model_type == name and not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(IDS).logits, model({"input_ids": IDS}).logits, rtol=1e-4, atol=1e-5)
    again = import_hf(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_half_precision_gemma_rounds_its_scale_as_theirs_does(tmp_path):
    model = random_model(T.GemmaForCausalLM, T.GemmaConfig(**GEMMA)).bfloat16()
    model.save_pretrained(tmp_path)
    theirs, ours = T.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16), import_hf(tmp_path)
    embedded = theirs.embed_tokens(IDS)
    assert torch.equal(ours.embedding({"input_ids": IDS}, torch.arange(14)[None]), embedded)


def test_tied_layers_are_written_out_one_by_one(tmp_path):
    model = _decoder()
    looped = model.with_stack(repeat(model.stack, [0, 1, 1, 2], tie=True))
    loaded = T.AutoModelForCausalLM.from_pretrained(export_hf(looped, tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, looped({"input_ids": IDS}).logits, rtol=1e-4, atol=1e-5)


def test_two_different_matrices_are_not_tied_whatever_the_config_says(tmp_path):
    model = random_model(T.LlamaForCausalLM, T.LlamaConfig(**SMALL))
    model.save_pretrained(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    ours = import_hf(tmp_path)
    assert not ours.spec.head.tie and torch.equal(ours.head.weight, model.lm_head.weight)
    back = export_hf(ours, tmp_path / "back")
    loaded = T.AutoModelForCausalLM.from_pretrained(back).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_model_without_head_goes_both_ways(tmp_path):
    theirs = random_model(T.LlamaModel, T.LlamaConfig(**SMALL))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = import_hf(tmp_path / "theirs")
    assert ours.head is None
    back = export_hf(ours, tmp_path / "back")
    assert tensors_of(back).keys() == tensors_of(tmp_path / "theirs").keys()
    with torch.no_grad():
        assert torch.equal(T.AutoModel.from_pretrained(back).eval()(IDS)[0], theirs(IDS)[0])


def test_old_gpt2_files_without_prefix_and_with_masks(tmp_path):
    from safetensors.torch import save_file

    theirs = random_model(*CASES["gpt2"])
    theirs.save_pretrained(tmp_path)
    tensors = {n.removeprefix("transformer."): t for n, t in tensors_of(tmp_path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(import_hf(tmp_path)({"input_ids": IDS}).logits, theirs(IDS).logits, rtol=0, atol=1e-4)


def test_a_config_in_the_older_form_reads_the_same(tmp_path):
    theirs = random_model(*CASES["llama-llama3"])
    theirs.save_pretrained(tmp_path)
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    change_config(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    ours = import_hf(tmp_path)
    assert ours.spec == import_hf(export_hf(ours, tmp_path / "back")).spec
    with torch.no_grad():
        torch.testing.assert_close(ours({"input_ids": IDS}).logits, theirs(IDS).logits, rtol=0, atol=1e-4)


def test_the_length_a_model_is_meant_for(tmp_path):
    model = random_model(T.LlamaForCausalLM, T.LlamaConfig(**SMALL, max_position_embeddings=512))
    model.save_pretrained(tmp_path / "theirs")
    ours = import_hf(tmp_path / "theirs")

    def written(model, name, **given):
        return config_of(export_hf(model, tmp_path / name, **given))["max_position_embeddings"]

    assert [written(ours, "a"), written(ours, "b", max_length=64), written(ours, "c", max_length=1024)] == [512, 512, 1024]
    assert [written(_decoder(), "d"), written(_decoder(), "e", max_length=64)] == [2048, 64]


def test_the_tokenizer_goes_along_and_numbers_stay(text, tmp_path):
    """The config's own numbers of special tokens win over guesses from the tokenizer's names; guesses fill what it leaves open."""
    vocab = text.tokenizer.get_vocab_size()
    model = random_model(T.LlamaForCausalLM, T.LlamaConfig(**{**SMALL, "vocab_size": vocab}, bos_token_id=None, eos_token_id=77))
    model.generation_config.eos_token_id = [77, 78]
    model.save_pretrained(tmp_path / "theirs")
    back = export_hf(import_hf(tmp_path / "theirs"), tmp_path / "back", tokenizer=text.tokenizer)
    tokenizer, config = T.AutoTokenizer.from_pretrained(back), T.AutoConfig.from_pretrained(back)
    assert config.eos_token_id == 77 and tokenizer.eos_token_id == 77
    assert config.pad_token_id == tokenizer.pad_token_id == text.tokenizer.token_to_id("<pad>")
    assert T.GenerationConfig.from_pretrained(back).eos_token_id == [77, 78]


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim is 16"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("llama-linear", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rotary scaling.*dynamic.*linear and llama3"),
        ("llama-llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, r"config\.json lacks or garbles 'low_freq_factor'"),
        ("llama-linear", {"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification has a head"),
    ],
)
def test_configs_that_cannot_be_read_are_named(case, change, message, tmp_path):
    random_model(*CASES[case]).save_pretrained(tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(BadInput, match=message):
        import_hf(tmp_path)


@pytest.mark.parametrize(
    ("layer", "parts", "message"),
    [
        (
            {},
            {"stack": {"overrides": {"2": {"ffn_width": 80}}}},
            "layer 2 has ffn_width 80 and layer 0 has 88; a llama cannot have both",
        ),
        ({}, {"head": {"bias": True}}, "its head has bias True; llama has False"),
        ({}, {"stack": {"final_norm": False}}, "its stack has final_norm False; llama has True"),
        ({"attention_scale": 1.0}, {}, r"layer 0 has attention_scale 1\.0; llama layers have 0\.35"),
        ({}, {"head": {"kind": "classifier", "classes": 2}}, "its head has kind 'classifier'; llama has 'lm'"),
        (
            {},
            {"stack": {"overrides": {"0": {"window": 4}, "1": {"window": 6}}}},
            "layer 1 has window 6 and layer 0 has 4; a ministral cannot have both",
        ),
    ],
)
def test_the_first_obstacle_is_named_with_the_families(layer, parts, message):
    with pytest.raises(BadInput, match=message + r".*Families: llama, mistral, .*bert"):
        family_for(_decoder(layer, **parts).spec)


def test_training_settings_are_no_obstacle(tmp_path):
    spec = _decoder({"dropout": 0.1, "attention_dropout": 0.2, "drop": 0.3, "norm_gain": 0.5}).spec
    assert family_for(spec).name == "llama"
    assert family_for(dataclasses.replace(spec, stack=dataclasses.replace(spec.stack, init_std=0.5))).name == "llama"
