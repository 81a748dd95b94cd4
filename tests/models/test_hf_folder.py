"""Folders that are damaged, hostile or only nearly right; what a checkpoint of ours keeps of where a model came from."""

import json
import random

import pytest
import torch
import transformers as T
from hf_reference import SMALL, change_config, random_model, tensors_of
from safetensors.torch import save_file

from layerwise.edit.adapt import lora, merge_lora
from layerwise.errors import BadInput
from layerwise.models.checkpoint import load, save
from layerwise.models.hf import FAMILIES, export_hf, import_hf
from layerwise.models.hf.family import Family
from layerwise.models.hf.shards import INDEX
from layerwise.models.model import build
from layerwise.models.origin import origin_of
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.stack.surgery import repeat
from layerwise.table import lookup

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def _llama(folder, **given):
    model = random_model(T.LlamaForCausalLM, T.LlamaConfig(**SMALL))
    model.save_pretrained(folder, **given)
    return model


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_there_and_says_its_name(name):
    family: Family = lookup(FAMILIES, name, "family")
    assert family.name == name and (family.headed or name == "clip") and family.base and bool(family.head_names) == bool(family.lm)
    for architecture in (*family.headed, *family.base):
        assert hasattr(T, architecture), architecture


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "pytorch_model.bin", ""])
def test_an_index_may_not_point_out_of_its_folder(file, tmp_path):
    _llama(tmp_path / "m", max_shard_size="10KB")
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (tmp_path / "m" / INDEX).write_text(json.dumps(index))
    with pytest.raises(BadInput, match="outside its folder, or one that is not safetensors"):
        import_hf(tmp_path / "m")


def test_shards_of_theirs_are_read_and_a_lost_one_is_named(tmp_path):
    theirs = _llama(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with torch.no_grad():
        torch.testing.assert_close(import_hf(tmp_path)({"input_ids": IDS}).logits, theirs(IDS).logits, rtol=0, atol=1e-4)
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(BadInput, match=lost.name):
        import_hf(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": 3}', "{}", "\x00\xff", "[" * 100_000])
@pytest.mark.parametrize("file", [INDEX, "config.json"])
def test_json_that_is_none_is_named(file, content, tmp_path):
    _llama(tmp_path)
    (tmp_path / file).write_text(content, encoding="latin-1")
    with pytest.raises(BadInput, match=file):
        import_hf(tmp_path)


@pytest.mark.parametrize("cut", [0, 7, 100, 5000])
def test_a_cut_file_of_theirs_is_named(cut, tmp_path):
    _llama(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        import_hf(tmp_path)


HOSTILE = {
    "llama": (T.LlamaForCausalLM, T.LlamaConfig(**SMALL)),
    "gpt2": (T.GPT2LMHeadModel, T.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)),
    "gpt_neox": (T.GPTNeoXForCausalLM, T.GPTNeoXConfig(**SMALL)),
    "electra": (T.ElectraForMaskedLM, T.ElectraConfig(**SMALL, embedding_size=16)),
    "t5": (T.T5ForConditionalGeneration, T.T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
    "beit": (
        T.BeitForImageClassification,
        T.BeitConfig(
            hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
            use_relative_position_bias=True,
        ),
    ),
    "bit": (T.BitModel, T.BitConfig(embedding_size=8, hidden_sizes=[16], depths=[1], num_groups=4)),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_whatever_stands_in_a_config_the_answer_is_a_model_or_one_message(name, tmp_path):
    random_model(*HOSTILE[name]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in config:
        for value in (None, -1, 0, 3, 10**6, 10**30, 1.5, "x", [], {}, True, [None]):
            (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
            try:
                import_hf(tmp_path)
            except BadInput as error:
                assert str(tmp_path) in str(error) or "checkpoints are not known" in str(error), (key, value, error)


def test_pickles_are_refused_in_every_spelling(tmp_path):
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "model.pkl"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        for read in (import_hf, load):
            for source in (folder, folder / name):
                with pytest.raises(BadInput, match=r"(?s)holds only pickle files.*python -c .*safetensors"):
                    read(source)


def test_remote_code_is_not_taken_over(tmp_path):
    _llama(tmp_path / "theirs")
    change_config(tmp_path / "theirs", auto_map={"AutoModelForCausalLM": "evil.Model"}, our_own_note="kept")
    with pytest.warns(UserWarning, match=r"names code of its own \(auto_map\); it is not run"):
        model = import_hf(tmp_path / "theirs")
    back = export_hf(load(save(model, tmp_path / "ours")), tmp_path / "back")
    config = json.loads((back / "config.json").read_text())
    assert "auto_map" not in config and config["our_own_note"] == "kept"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_kept_and_changed_on_request(dtype, tmp_path):
    _llama(tmp_path / "theirs")
    half = import_hf(tmp_path / "theirs", dtype=dtype)
    assert {t.dtype for t in half.state_dict().values()} == {dtype}
    back = export_hf(half, tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert {t.dtype for t in import_hf(back).state_dict().values()} == {dtype}
    whole = export_hf(half, tmp_path / "whole", dtype=torch.float32)
    assert {t.dtype for t in tensors_of(whole).values()} == {torch.float32}


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "b").write_text("a file")
    model = build(model_spec({**preset("decoder"), "embedding": {"vocab": 60}}))
    for name in "ab":
        for write in (export_hf, save):
            with pytest.raises(BadInput, match="choose another folder"):
                write(model, tmp_path / name)
    assert (tmp_path / "a" / "notes.txt").read_text() == "x" and (tmp_path / "b").read_text() == "a file"


def test_lora_goes_out_once_merged(tmp_path):
    _llama(tmp_path / "theirs")
    adapted = lora(import_hf(tmp_path / "theirs"), rank=2, targets=["q", "down"])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_b" in name:
                parameter.normal_(std=0.1)
    with pytest.raises(BadInput, match=r"layer 0 has lora linears: merge them first"):
        export_hf(adapted, tmp_path / "back")
    merged = merge_lora(adapted)
    loaded = T.AutoModelForCausalLM.from_pretrained(export_hf(merged, tmp_path / "back")).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, adapted.eval()({"input_ids": IDS}).logits, rtol=1e-4, atol=1e-4)


def test_our_checkpoint_keeps_and_checks_what_came_along(tmp_path):
    theirs = random_model(T.BertModel, T.BertConfig(**SMALL, max_position_embeddings=20))
    theirs.save_pretrained(tmp_path / "theirs")
    folder = save(import_hf(tmp_path / "theirs"), tmp_path / "ours")
    origin = origin_of(load(folder))
    assert origin.config["model_type"] == "bert"
    assert torch.equal(origin.carried["bert.pooler.dense.weight"], theirs.pooler.dense.weight)
    path = folder / "carried.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"carried\.safetensors"):
        load(folder)


def test_any_flipped_bit_of_our_checkpoint_is_noticed(tmp_path):
    data = preset("decoder")
    data["stack"] |= {"depth": 1, "width": 8}
    data["stack"]["layer"] |= {"heads": 2}
    folder = save(build(model_spec({**data, "embedding": {"vocab": 20}})), tmp_path / "m")
    rng = random.Random(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for _ in range(40):
            changed = bytearray(whole)
            changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(BadInput):
                load(folder)
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            if path.name != "checksums.json" or length != len(whole) - 1:  # its last byte is only the line's end
                with pytest.raises(BadInput):
                    load(folder)
        path.write_bytes(whole)
    load(folder)


def test_layers_with_buffers_stay_tied_too(tmp_path):
    data = {
        "embedding": {"kind": "pixels", "flatten": True, "channels": 1, "size": [4, 4]},
        "stack": {"layers": [{"kind": "dense", "channels": 16, "norm": "batch"}], "inputs": 16},
        "head": {"kind": "classifier", "bias": True, "classes": 3},
    }
    model = build(model_spec(data))
    looped = model.with_stack(repeat(model.stack, [0, 0], tie=True))
    again = load(save(looped, tmp_path / "m"))
    first, second = again.stack.layers
    names = [*dict(first.named_parameters()), *dict(first.named_buffers())]
    assert any("running_mean" in n for n in names)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        assert getattr(first.get_submodule(owner), leaf) is getattr(second.get_submodule(owner), leaf), name
    batch = {"pixel_values": torch.rand(2, 1, 4, 4)}
    assert torch.equal(again(batch).logits, looped.eval()(batch).logits)


def test_edits_keep_the_origin_and_copies_of_it(tmp_path):
    import copy

    _llama(tmp_path / "theirs")
    change_config(tmp_path / "theirs", eos_token_id=[7, 8])
    model = import_hf(tmp_path / "theirs")
    shorter = copy.deepcopy(model).with_stack(repeat(model.stack, [0, 2]))
    back = export_hf(shorter, tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == [7, 8]


def test_numbers_of_tokens_do_not_outlive_their_vocabulary(tmp_path):
    _llama(tmp_path / "theirs")
    change_config(tmp_path / "theirs", eos_token_id=59, pad_token_id=58)
    model = import_hf(tmp_path / "theirs")
    data = preset("decoder")
    data["stack"] |= {"depth": 1, "width": 32}
    other = build(model_spec({**data, "embedding": {"vocab": 20}}))
    other.__dict__["origin"] = origin_of(model)
    config = json.loads((export_hf(other, tmp_path / "back") / "config.json").read_text())
    assert config["vocab_size"] == 20 and not {"eos_token_id", "pad_token_id"} & config.keys()


def test_second_names_must_agree(tmp_path):
    theirs = random_model(T.T5ForConditionalGeneration, T.T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    theirs.save_pretrained(tmp_path)
    tensors = tensors_of(tmp_path)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    import_hf(tmp_path)
    tensors["encoder.embed_tokens.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"shared\.weight and .*encoder\.embed_tokens\.weight.* they differ"):
        import_hf(tmp_path)
