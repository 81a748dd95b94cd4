"""Our checkpoint: the same model back, and a clear word when it is not whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.edit.adapt import lora
from layerwise.errors import BadInput
from layerwise.files import CHECKSUMS, check_folder, sha256, whole_folder, write_file, write_json
from layerwise.models.checkpoint import load, save
from layerwise.models.load import described, export, load_any
from layerwise.models.model import build
from layerwise.models.presets import PRESETS, preset
from layerwise.models.spec import model_spec
from layerwise.stack.surgery import repeat

IDS = torch.arange(12).view(2, 6)


def _spec(name, **stack):
    data = preset(name)
    if data.get("embedding", {}).get("kind") in ("pixels", "patches"):
        data["stack"] |= {} if name == "vit" else {"inputs": 64 if name == "mlp" else 1}
        data["head"] |= {"classes": 3}
        data["embedding"] |= {"channels": 1, "size": [8, 8]}
    else:
        for part in ("stack", "decoder"):
            if part in data:
                data[part] |= {"depth": 2, "width": 16, **stack}
                data[part]["layer"] |= {"heads": 2}
        data["embedding"] = {**data.get("embedding", {}), "vocab": 40}
    return model_spec(data)


def _batch(name):
    if name in ("mlp", "vgg", "resnet", "vit"):
        return {"pixel_values": torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": IDS, "decoder_input_ids": IDS}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_the_same_model_comes_back(name, tmp_path):
    model = build(_spec(name), seed=3).eval()
    again = load(save(model, tmp_path / "m"))
    assert again.spec == model.spec and described(tmp_path / "m") == model.spec
    assert torch.equal(again(_batch(name)).logits, model(_batch(name)).logits)
    assert not any(t.is_meta for t in again.state_dict().values())


def test_building_is_a_function_of_the_seed_and_leaves_the_global_one_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a, b, c = (build(_spec("bert"), seed=s) for s in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.embedding.tokens.weight, c.embedding.tokens.weight)


def test_dtype_is_kept_or_changed_and_shared_layers_stay_shared(tmp_path):
    model = build(_spec("decoder")).bfloat16()
    assert load(save(model, tmp_path / "a")).head.weight.dtype == torch.bfloat16
    assert load(tmp_path / "a", dtype=torch.float32).head.weight.dtype == torch.float32
    looped = model.with_stack(repeat(model.stack, [0, 1, 1], tie=True))
    save(looped, tmp_path / "b")
    names = load_file(tmp_path / "b" / "model.safetensors").keys()
    assert not any(n.startswith("stack.layers.2") for n in names)
    again = load(tmp_path / "b")
    assert again.stack.layers[1].ffn.branch.up.weight is again.stack.layers[2].ffn.branch.up.weight
    assert torch.equal(again({"input_ids": IDS}).hidden, looped({"input_ids": IDS}).hidden)


def test_adapters_stay_the_only_trained_part(tmp_path):
    adapted = lora(build(_spec("decoder")), rank=2)
    again = load(save(adapted, tmp_path / "m"))
    assert (
        [n for n, p in again.named_parameters() if p.requires_grad] == [n for n, p in adapted.named_parameters() if p.requires_grad] != []
    )


@pytest.mark.parametrize("file", ["model.safetensors", "model.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damage_is_named(file, damage, tmp_path):
    folder = save(build(_spec("decoder")), tmp_path / "m")
    path = folder / file
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    with pytest.raises(BadInput, match=file if damage != "gone" or file != "model.json" else r"no model\.json"):
        load(folder)


def _rewritten(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / CHECKSUMS, {p.name: sha256(p) for p in folder.iterdir() if p.name != CHECKSUMS})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.weight"), r"missing head\.weight, unexpected none"),
        (lambda t: t.update(extra=torch.ones(1)), r"missing none, unexpected extra"),
        (lambda t: t.update({"head.weight": torch.ones(3, 3)}), r"head\.weight is \(3, 3\), expected \(40, 16\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    folder = save(build(_spec("decoder")), tmp_path / "m")
    _rewritten(folder, change)
    with pytest.raises(BadInput, match=message):
        load(folder)


def test_pickle_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(BadInput, match=r"(?s)pickle.*python -c .*AutoModel.*safetensors"):
        load_any(tmp_path)


def test_foreign_folders_are_not_overwritten_and_unknown_ones_named(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="choose another folder"):
        save(build(_spec("decoder")), tmp_path)
    with pytest.raises(BadInput, match="choose another folder"):
        export(build(_spec("decoder")), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(BadInput, match="Did you mean 'decoder'"):
        load_any("decodr")
    with pytest.raises(BadInput, match="there is no folder"):
        load_any(tmp_path / "nowhere" / "at-all")
    with pytest.raises(BadInput, match="format is hf.* or layerwise"):
        export(build(_spec("decoder")), tmp_path / "x", format="gguf")


def test_saving_over_an_older_checkpoint_replaces_it_whole(tmp_path):
    a, b = build(_spec("decoder"), 1), build(_spec("decoder"), 2)
    save(a, tmp_path / "m")
    save(b, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m").head.weight, b.head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_failed_write_leaves_the_old_folder_and_no_trace(tmp_path):
    with whole_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("new")
        raise RuntimeError
    assert (tmp_path / "x" / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]
    check_folder(tmp_path / "x")
    write_file(tmp_path / "y", "1")
    assert (tmp_path / "y").read_text() == "1"
    with pytest.raises(ValueError):
        write_json(tmp_path / "z", {"a": float("nan")})
    assert not (tmp_path / "z").exists()
