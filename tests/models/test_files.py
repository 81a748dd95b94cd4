"""Files that are whole or absent, and the folders that hold models: checkpoints and runs."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.edit.adapt import lora
from layerwise.errors import BadInput
from layerwise.files import CHECKSUMS, check_folder, digest, sha256, whole_folder, write_file, write_json
from layerwise.models.checkpoint import load, save
from layerwise.models.load import described, load_any
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.linear import LoRA
from layerwise.stack.surgery import repeat

IDS = torch.arange(12).view(2, 6)


def _model(name="decoder", seed=0):
    data = preset(name)
    for part in ("stack", "decoder"):
        if part in data:
            data[part] |= {"depth": 2, "width": 16}
            data[part]["layer"] |= {"heads": 2}
    data["embedding"] = {**data.get("embedding", {}), "vocab": 40}
    return build(model_spec(data), seed).eval()


def _names(folder):
    return sorted(p.name for p in folder.iterdir())


# write_file, write_json


def test_a_file_is_written_whole_over_the_old_one(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    for content in ("first", b"\x00\xff", "Grüße"):
        assert write_file(path, content) == path
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert _names(path.parent) == ["a.txt"]
    write_json(path, {"b": [1, None, "é"]})
    assert json.loads(path.read_text()) == {"b": [1, None, "é"]}


def test_a_crash_while_writing_leaves_the_old_content(tmp_path, monkeypatch):
    path = write_file(tmp_path / "a.txt", "old")

    def crash(*_):
        raise OSError("no space left")

    for owner, name in ((os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as broken:
            broken.setattr(owner, name, crash)
            with pytest.raises(OSError, match="no space"):
                write_file(path, "new")
        assert path.read_text() == "old" and _names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}, object()])
def test_what_is_not_json_is_not_written(tmp_path, value):
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", value)
    assert _names(tmp_path) == []


def test_digests(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"content").hexdigest()
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


# whole_folder, check_folder


def _made(target, text="old"):
    with whole_folder(target) as folder:
        (folder / "a").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text(text * 2)
    return target


def test_a_whole_folder_lists_all_its_files(tmp_path):
    made = _made(tmp_path / "x" / "y")
    assert json.loads((made / CHECKSUMS).read_text()) == {n: sha256(made / n) for n in ("a", "sub/b")}
    check_folder(made)
    with whole_folder(made) as folder:
        (folder / "c").write_text("alone")
    assert _names(made) == ["c", CHECKSUMS] and _names(tmp_path / "x") == ["y"], "nothing of the old folder stays"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_leaves_the_old_folder_and_no_temporary_one(tmp_path, error):
    made = _made(tmp_path / "x")
    with pytest.raises(error), whole_folder(made) as folder:
        (folder / "a").write_text("new")
        raise error
    with pytest.raises(error), whole_folder(tmp_path / "never") as folder:
        raise error
    assert (made / "a").read_text() == "old" and _names(tmp_path) == ["x"]
    check_folder(made)


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    made, rename = _made(tmp_path / "x"), Path.rename

    def refused(self, target):
        if ".new-" in self.name:
            raise OSError("refused")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    monkeypatch.setattr("layerwise.files._exchange", lambda one, other: False)
    with pytest.raises(OSError, match="refused"):
        _made(made, "new")
    assert (made / "a").read_text() == "old" and _names(tmp_path) == ["x"]


DAMAGE = {
    "cut short": (lambda f: (f / "a").write_text("ol"), r"damaged: the content of a does not match its checksum"),
    "flipped": (lambda f: (f / "sub" / "b").write_text("oldolc"), r"damaged: the content of sub/b does not match"),
    "gone": (lambda f: (f / "sub" / "b").unlink(), r"damaged: sub/b is missing"),
    "no checksums": (lambda f: (f / CHECKSUMS).unlink(), r"checksums\.json is missing or unreadable"),
    "garbled checksums": (lambda f: (f / CHECKSUMS).write_text("{"), r"checksums\.json is missing or unreadable"),
    "checksums of another shape": (lambda f: (f / CHECKSUMS).write_text("3"), r"checksums\.json is missing or unreadable"),
    "a list": (lambda f: (f / CHECKSUMS).write_text("[1]"), r"checksums\.json is missing or unreadable"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_named(tmp_path, damage):
    made = _made(tmp_path / "x")
    change, message = DAMAGE[damage]
    change(made)
    with pytest.raises(BadInput, match=message):
        check_folder(made)


# Checkpoints, beyond test_checkpoint.py


@pytest.mark.parametrize("name", ["decoder", "bert", "encoder-decoder"])
@pytest.mark.parametrize("at", [0.02, 0.3, 0.7, 0.999])
def test_a_flipped_bit_anywhere_in_the_tensors_is_found(tmp_path, name, at):
    folder = save(_model(name), tmp_path / "m")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"model\.safetensors does not match its checksum"):
        load(folder)


@pytest.mark.parametrize("size", [0, 3, 8, 200, -1])
def test_cut_tensors_with_fitting_checksums_are_still_named(tmp_path, size):
    folder = save(_model(), tmp_path / "m")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    write_json(folder / CHECKSUMS, {p.name: sha256(p) for p in folder.iterdir() if p.name != CHECKSUMS})
    with pytest.raises(BadInput, match=r"model\.safetensors cannot be read"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a model's description"),
        ("{}", "not a model's description"),
        ('{"format": 99, "spec": {}}', r"has format 99; this version of layerwise reads format 1"),
        ('{"format": 1, "spec": {"stack": {"depht": 2}}}', "not a model's description.*depht"),
        ('{"format": 1, "spec": {"stack": {"width": 0}}}', "width"),
        ('{"format": 1, "spec": {}, "shared": 3}', "not a model's description"),
        (b"\xff\xfe\x00", "not a model's description"),
        ("[" * 100_000, "not a model's description"),
    ],
)
def test_descriptions_that_are_none_are_refused(tmp_path, content, message):
    folder = save(_model(), tmp_path / "m")
    (folder / "model.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    write_json(folder / CHECKSUMS, {p.name: sha256(p) for p in folder.iterdir() if p.name != CHECKSUMS})
    for reading in (load, described):
        with pytest.raises(BadInput, match=message):
            reading(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_kept_and_changed_on_request(tmp_path, dtype):
    model = _model("bert").to(dtype)
    folder = save(model, tmp_path / "m")
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {dtype}
    again = load(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert {t.dtype for t in load_any(folder, dtype=torch.float32).state_dict().values()} == {torch.float32}


def test_lora_over_tied_layers_comes_back_shared_and_trainable(tmp_path):
    model = _model()
    tied = model.with_stack(repeat(lora(model, rank=2).stack, [0, 1, 0, 1], tie=True))
    for module in tied.modules():
        if isinstance(module, LoRA):
            torch.nn.init.normal_(module.lora_b)
    again = load(save(tied, tmp_path / "m"))
    assert torch.equal(again({"input_ids": IDS}).logits, tied({"input_ids": IDS}).logits)
    for i in (0, 1):
        a, b = (dict(again.stack.layers[j].named_parameters()) for j in (i, i + 2))
        assert a.keys() == b.keys() and all(a[n] is b[n] for n in a)
    assert len(list(again.parameters())) == len(list(tied.parameters()))
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    untied = save(model.with_stack(repeat(model.stack, [0, 1, 0, 1], tie=False)), tmp_path / "u")
    assert size < (untied / "model.safetensors").stat().st_size


def test_tensors_that_view_one_buffer_are_written_apart(tmp_path):
    model = _model()
    with torch.no_grad():
        branch = model.stack.layers[0].mixer.branch
        fused = torch.randn(3, 16, 16)
        for i, role in enumerate("qkv"):
            getattr(branch, role).weight = torch.nn.Parameter(fused[i])
        branch.o.weight = torch.nn.Parameter(torch.randn(16, 16).T)
    again = load(save(model, tmp_path / "m"))
    assert torch.equal(again({"input_ids": IDS}).logits, model({"input_ids": IDS}).logits)


def test_loading_needs_no_random_numbers_and_leaves_evaluation_mode(tmp_path):
    folder = save(_model().train(), tmp_path / "m")
    state = torch.get_rng_state()
    assert not load(folder).training and torch.equal(torch.get_rng_state(), state)


def test_a_crash_while_saving_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    import layerwise.models.checkpoint as checkpoint

    old = _model(seed=1)
    folder = save(old, tmp_path / "m")

    def crash(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_tensors", crash)
    with pytest.raises(OSError, match="no space"):
        save(_model(seed=2), folder)
    assert torch.equal(load(folder).head.weight, old.head.weight) and _names(tmp_path) == ["m"]


def test_an_empty_folder_is_filled_and_a_file_is_not_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    assert load(save(_model(), tmp_path / "empty")).spec.stack.depth == 2
    (tmp_path / "file").write_text("text")
    with pytest.raises(BadInput, match="choose another folder"):
        save(_model(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_pickle_is_refused_unopened_with_the_conversion_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(BadInput, match=r"(?s)holds only pickle files.*python -c .*safetensors"):
            load(source)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"no layerwise checkpoint \(no model\.json\)"):
        load(tmp_path)


def test_the_tokenizer_is_kept_beside(tmp_path, text):
    from layerwise.data.tokenizer import read_tokenizer

    folder = save(_model(), tmp_path / "m", tokenizer=text.tokenizer)
    assert read_tokenizer(str(folder / "tokenizer.json")).to_str() == text.tokenizer.to_str()
    check_folder(folder)


# Run folders


def _run(folder, *models):
    folder.mkdir()
    (folder / "job.yaml").write_text("{}")
    for i, name in enumerate(models):
        save(_model(seed=i), folder / "models" / name)
    return folder


def test_the_one_model_of_a_run_is_found(tmp_path):
    run = _run(tmp_path / "run", "main/seed-0")
    for source in (run, str(run), run / "models" / "main" / "seed-0"):
        assert torch.equal(load_any(source).head.weight, _model().head.weight)
    assert described(run) == _model().spec


def test_of_several_models_of_a_run_one_must_be_named(tmp_path):
    run = _run(tmp_path / "run", "a/seed-0", "a/seed-1")
    for reading in (load_any, described):
        with pytest.raises(BadInput, match=r"is a run with 2 models: name one of them \(models/a/seed-0, models/a/seed-1\)"):
            reading(run)
    assert torch.equal(load_any(run / "models" / "a" / "seed-1").head.weight, _model(seed=1).head.weight)


def test_a_run_without_a_model_and_a_folder_without_anything(tmp_path):
    run = _run(tmp_path / "run")
    (run / "models").mkdir()
    with pytest.raises(BadInput, match=r"run with 0 models.*\(none\)"):
        load_any(run)
    (tmp_path / "nothing").mkdir()
    for reading in (load_any, described):
        with pytest.raises(BadInput, match=r"no model\.json.*no (Hugging Face one \(no )?config\.json"):
            reading(tmp_path / "nothing")


def test_overrides_shape_presets_and_nothing_else(tmp_path):
    small = load_any("decoder", seed=4, stack={"depth": 1, "width": 8}, embedding={"vocab": 9}, dtype=torch.bfloat16)
    assert (small.spec.stack.depth, small.spec.stack.width, small.head.weight.dtype) == (1, 8, torch.bfloat16)
    again = load_any("decoder", seed=4, stack={"depth": 1, "width": 8}, embedding={"vocab": 9}, dtype=torch.bfloat16)
    assert torch.equal(small.head.weight, again.head.weight)
    with pytest.raises(BadInput, match=r"overrides \(stack\) shape a preset"):
        load_any(save(_model(), tmp_path / "m"), stack={"depth": 1})
