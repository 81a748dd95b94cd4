"""Matrices in the GPTQ format: written, read, decoded by bits with nothing of ours, and refused where they are damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from hf_reference import SMALL, random_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.jobs.inspection import convert_checkpoint
from layerwise.models.hf.gptq_read import zero_codes
from layerwise.models.load import described
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec

G = torch.Generator().manual_seed(0)
IDS = torch.arange(24).view(2, 12) * 7 % 262
WIDE = {**SMALL, "vocab_size": 262, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LONG = {"max_position_embeddings": 64}
FAMILIES = {
    "llama": (T.LlamaForCausalLM, T.LlamaConfig(**WIDE, **LONG, num_key_value_heads=2)),
    "gpt2": (
        T.GPT2LMHeadModel,
        T.GPT2Config(vocab_size=262, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    ),
    "gpt_neox": (T.GPTNeoXForCausalLM, T.GPTNeoXConfig(**WIDE, **LONG, eos_token_id=2)),
    "opt": (T.OPTForCausalLM, T.OPTConfig(vocab_size=262, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, **LONG)),
    "bert": (T.BertModel, T.BertConfig(**WIDE, **LONG)),
}


def _decoded(tensors, prefix, bits, second):
    """A matrix (out, in) out of the GPTQ format, by bits, with nothing of ours."""

    def streams(words):  # (words, columns) int32 -> (numbers, columns), lowest bits first down each column
        raw = words.numpy().astype(np.uint32)
        ones = (raw[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
        ones = ones.reshape(-1, bits, raw.shape[1]) if (raw.shape[0] * 32) % bits == 0 else None
        return (ones * (1 << np.arange(bits))[None, :, None]).sum(axis=1)

    codes = streams(tensors[prefix + "qweight"])
    zeros = streams(tensors[prefix + "qzeros"].t().contiguous()).T + (0 if second else 1)
    scales, of = tensors[prefix + "scales"].float().numpy(), tensors[prefix + "g_idx"].numpy()
    return torch.from_numpy(scales[of] * (codes - zeros[of])).t()


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(2, 16, False), (3, 32, True), (4, 64, False), (8, None, True)])
def test_gptq_checkpoints_decoded_by_bits_hold_the_packed_matrices(bits, group, symmetric, text, tmp_path):
    data = preset("decoder")
    data["stack"] |= {"depth": 2, "width": 64, "init_std": 0.3}
    data["stack"]["layer"] |= {"heads": 2, "ffn_width": 128}
    model = build(model_spec({**data, "embedding": {"vocab": 256}})).eval()
    packed = lw.edit.quantize(model, text, bits=bits, group=group, symmetric=symmetric, samples=4)
    folder = lw.export(packed, tmp_path / "gptq", format="gptq")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")  # gptqmodel refuses the first version of others
    assert config["bits"] == bits and config["group_size"] == (group or -1) and config["sym"] is symmetric and not config["desc_act"]
    for ours, theirs in (
        ("mixer.branch.q", "self_attn.q_proj"),
        ("mixer.branch.o", "self_attn.o_proj"),
        ("ffn.branch.down", "mlp.down_proj"),
    ):
        module = packed.get_submodule(f"stack.layers.1.{ours}")
        prefix = f"model.layers.1.{theirs}."
        made = _decoded(tensors, prefix, bits, config["checkpoint_format"] == "gptq_v2")
        torch.testing.assert_close(made, module.materialize(), atol=0, rtol=1e-6, check_dtype=False)
        assert tensors[prefix + "qweight"].shape == (module.in_features * bits // 32, module.out_features)
        assert tensors[prefix + "scales"].dtype == torch.float16 and prefix + "weight" not in tensors
    parsed = T.GPTQConfig.from_dict(config)
    assert parsed.bits == bits and parsed.quant_method == "gptq"
    assert (folder / "model.safetensors").stat().st_size < sum(t.numel() * t.element_size() for t in packed.state_dict().values()) + 30_000


def test_layers_of_other_widths_are_named_and_what_the_format_cannot_hold_is_refused(text, tmp_path):
    data = preset("decoder")
    data["stack"] |= {"depth": 3, "width": 64}
    data["stack"]["layer"] |= {"heads": 2, "ffn_width": 128}
    model = build(model_spec({**data, "embedding": {"vocab": 256}})).eval()
    mixed = lw.edit.quantize(model, method="rtn", bits=[4, 16, 2], group=16)
    folder = lw.export(mixed, tmp_path / "mixed", format="gptq")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["bits"] == 4 and settings["dynamic"] == {r"-:.*layers\.1\..*": {}, r"+:.*layers\.2\..*": {"bits": 2}}
    assert "model.layers.1.self_attn.q_proj.weight" in load_file(folder / "model.safetensors")
    lw.save(mixed, tmp_path / "ours")
    again = convert_checkpoint(tmp_path / "ours", tmp_path / "converted", to="gptq")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(BadInput, match="edit: quantize"):
        lw.export(model, tmp_path / "dense", format="gptq")
    with pytest.raises(BadInput, match="multiples of 32"):
        lw.export(
            lw.edit.quantize(lw.load("decoder", stack={"depth": 1, "width": 48}, embedding={"vocab": 256}), method="rtn"),
            tmp_path / "odd",
            format="gptq",
        )


def _same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The folder of a small checkpoint of each family."""
    folder = tmp_path_factory.mktemp("plain")
    for name, (kind, config) in FAMILIES.items():
        random_model(kind, config).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_reads_back_bit_by_bit_in_every_layout_of_matrices(name, theirs, tmp_path):
    model = lw.load(theirs / name)
    for bits, group, symmetric in ((4, 32, False), (3, None, True)):
        packed = lw.edit.quantize(model, method="rtn", bits=bits, group=group, symmetric=symmetric)
        folder = lw.export(packed, tmp_path / f"{bits}", format="gptq")
        assert described(folder) == packed.spec
        back = lw.load(folder)
        assert back.spec == packed.spec and _same(back.state_dict(), packed.state_dict())
        again = lw.export(back, tmp_path / f"{bits}-again", format="gptq")
        for file in ("model.safetensors", "config.json"):
            assert (again / file).read_bytes() == (folder / file).read_bytes()
        with torch.no_grad():
            assert torch.equal(back({"input_ids": IDS}).hidden, packed({"input_ids": IDS}).hidden)


def test_a_checkpoint_that_was_read_trains_low_rank_terms_and_leaves_as_a_plain_one(theirs, tmp_path):
    packed = lw.edit.quantize(lw.load(theirs / "llama"), method="rtn", bits=4, group=32)
    model = lw.load(lw.export(packed, tmp_path / "gptq", format="gptq"))
    tuned = lw.edit.lora(model, rank=2, targets=["q", "down"])
    F.cross_entropy(tuned({"input_ids": IDS}).logits.flatten(0, 1), IDS.flatten()).backward()
    assert all((p.grad is not None) == (".lora_" in n) for n, p in tuned.named_parameters())
    plain = lw.export(lw.edit.merge(model), tmp_path / "plain")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    with torch.no_grad():
        theirs_now = T.AutoModelForCausalLM.from_pretrained(plain).eval()
        torch.testing.assert_close(theirs_now(IDS).logits, model({"input_ids": IDS}).logits, atol=1e-4, rtol=1e-4)


def _words(numbers, bits):
    """(n, columns) whole numbers -> 32-bit words, lowest bits first down each column; with nothing of ours."""
    ones = (numbers[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    ones = ones.reshape(-1, 32, numbers.shape[1]).astype(np.uint64)
    return torch.from_numpy((ones << np.arange(32, dtype=np.uint64)[None, :, None]).sum(axis=1).astype(np.uint32).view(np.int32))


def _in_act_order(folder, bits, group, second):
    """Rewrite a plain folder: every matrix of its layers drawn anew in the format, groups in no order. Returns what they stand for."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    form = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": True, "sym": False}
    config["quantization_config"] = {**form, "checkpoint_format": "gptq_v2"} if second else form
    made = {}
    for name in [n for n in tensors if "_proj.weight" in n]:
        outer, inner = tensors.pop(name).shape
        stem = name.removesuffix("weight")
        codes = torch.randint(2**bits, (inner, outer), generator=G).numpy()
        zeros = torch.randint(1 - second, 2**bits, (inner // group, outer), generator=G).numpy()
        scales = (torch.rand(inner // group, outer, generator=G) + 0.5).half() / 50
        of = (torch.arange(inner) // group)[torch.randperm(inner, generator=G)]
        made[name] = torch.from_numpy(scales.float().numpy()[of] * (codes - zeros[of])).t()
        qzeros = _words((zeros if second else zeros - 1).T.copy(), bits).t().contiguous()
        tensors |= {stem + "qweight": _words(codes, bits), stem + "qzeros": qzeros, stem + "scales": scales, stem + "g_idx": of.int()}
        tensors[stem + "bias"] = torch.zeros(outer)  # as some writers do
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize(("bits", "second"), [(4, False), (4, True), (3, False), (2, True), (8, False)])
def test_checkpoints_in_act_order_hold_what_their_bits_and_index_say(bits, second, tmp_path):
    random_model(*FAMILIES["llama"]).save_pretrained(tmp_path / "theirs")
    made = _in_act_order(tmp_path / "theirs", bits, 32, second)
    model = lw.load(tmp_path / "theirs")
    assert described(tmp_path / "theirs") == model.spec and model.spec.stack.layers[0].linears["q"].indexed
    ours = {
        "self_attn.q_proj": "mixer.branch.q",
        "self_attn.o_proj": "mixer.branch.o",
        "mlp.up_proj": "ffn.branch.up",
        "mlp.down_proj": "ffn.branch.down",
    }
    for name, our in ours.items():
        matrix = model.get_submodule(f"stack.layers.1.{our}").materialize()
        torch.testing.assert_close(matrix, made[f"model.layers.1.{name}.weight"], atol=0, rtol=1e-6, check_dtype=False)
    again = lw.load(lw.save(model, tmp_path / "own"))
    folder = lw.export(again, tmp_path / "again", format="gptq")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["desc_act"]
    assert _same(lw.load(folder).state_dict(), model.state_dict())
    tuned = lw.edit.lora(model, rank=2, targets=["q"])
    with torch.no_grad():
        assert torch.equal(tuned({"input_ids": IDS}).logits, model({"input_ids": IDS}).logits)


def test_a_matrix_that_gptqmodel_made_in_act_order_is_what_gptqmodel_makes_of_it(tmp_path):
    golden = json.loads((Path(__file__).parents[1] / "golden" / "gptqmodel.json").read_text())
    random_model(*FAMILIES["llama"]).save_pretrained(tmp_path / "theirs")
    _in_act_order(tmp_path / "theirs", golden["bits"], golden["group"], second=False)
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        name = f"model.layers.1.self_attn.k_proj.{part}"
        tensors[name] = torch.tensor(golden[part], dtype=tensors[name].dtype)
    save_file(tensors, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    made = lw.load(tmp_path / "theirs").stack.layers[1].mixer.branch.k.materialize()
    torch.testing.assert_close(made[:8], torch.tensor(golden["dequantized"]), atol=1e-5, rtol=1e-3)  # theirs is in float16


def test_a_zero_of_0_less_one_borrows_from_the_next_number_and_comes_back():
    for bits in (2, 4, 8):
        zeros = torch.randint(2**bits, (64, 5), generator=G).numpy()
        zeros[::7] = 0
        words = _words(zeros, bits).t().contiguous()
        one = np.uint32(sum(1 << at for at in range(0, 32, bits)))
        less = torch.from_numpy((words.numpy().view(np.uint32) - one).view(np.int32))
        assert np.array_equal(zero_codes(less, bits, second=False).numpy().T, zeros)
        assert np.array_equal(zero_codes(words, bits, second=True).numpy().T, zeros)


def test_matrices_of_a_layer_in_different_bits_are_named_one_by_one(theirs, tmp_path):
    model = lw.load(theirs / "llama")
    four, two = (
        lw.load(lw.export(lw.edit.quantize(model, method="rtn", bits=b, group=32), tmp_path / f"{b}", format="gptq")) for b in (4, 2)
    )
    tensors = load_file(tmp_path / "4" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj."
    tensors |= {n: t for n, t in load_file(tmp_path / "2" / "model.safetensors").items() if n.startswith(name)}
    save_file(tensors, tmp_path / "4" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "4" / "checksums.json").unlink()
    mixed = lw.load(tmp_path / "4")
    assert {r: s.bits for r, s in mixed.spec.stack.layers[1].linears.items()} == {
        **dict.fromkeys(("q", "k", "v", "o", "gate", "down"), 4),
        "up": 2,
    }
    assert torch.equal(mixed.stack.layers[1].ffn.branch.up.materialize(), two.stack.layers[1].ffn.branch.up.materialize())
    assert torch.equal(mixed.stack.layers[1].ffn.branch.down.materialize(), four.stack.layers[1].ffn.branch.down.materialize())
    folder = lw.export(mixed, tmp_path / "mixed", format="gptq")
    found = json.loads((folder / "config.json").read_text())["quantization_config"]["dynamic"]
    assert found == {r"+:model\.layers\.1\.mlp\.up_proj$": {"bits": 2}}
    assert _same(lw.load(folder).state_dict(), mixed.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: c.update(quant_method="awq"), "quant_method 'awq'.*gptq"),
        (lambda t, c: c.update(checkpoint_format="marlin"), "marlin"),
        (lambda t, c: c.update(group_size="128"), "group_size is a number"),
        (lambda t, c: t.pop("model.layers.0.mlp.up_proj.scales"), "not the sizes of a matrix of 96 x 64"),
        (lambda t, c: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(7, 96, dtype=torch.int32)}), "not the sizes"),
        (lambda t, c: t.update({"model.layers.0.mlp.up_proj.qzeros": torch.zeros(2, 12)}), "32-bit whole numbers"),
        (lambda t, c: t.update({"model.layers.0.mlp.up_proj.scales": torch.full((2, 96), float("nan"))}), "not finite"),
        (lambda t, c: t.update({"model.layers.0.mlp.up_proj.g_idx": torch.full((64,), 2)}), "g_idx holds a group, 0 to 1"),
        (lambda t, c: t.update({"model.layers.0.mlp.up_proj.g_idx": torch.arange(64).flip(0) // 32}), "not runs of neighbours"),
        (lambda t, c: t.update({"model.embed_tokens.qweight": torch.zeros(4, 4, dtype=torch.int32)}), "not the sizes|plain embeddings"),
        (lambda t, c: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 64)}), "beside"),
    ],
)
def test_damaged_and_other_formats_are_refused_by_name(change, message, theirs, tmp_path):
    folder = lw.export(lw.edit.quantize(lw.load(theirs / "llama"), method="rtn", bits=4, group=32), tmp_path / "gptq", format="gptq")
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checksums.json").unlink()
    with pytest.raises(BadInput, match=message):
        lw.load(folder)
