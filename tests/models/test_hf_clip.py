"""CLIP, whole and in its towers, exact in both directions."""

import json

import pytest
import torch
import transformers as T
from hf_reference import change_config, goes_and_comes_back, random_model

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.models.checkpoint import load, save
from layerwise.models.hf import export_hf, import_hf
from layerwise.models.model import build

END, PAD = 59, 58
TEXT = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 12, "eos_token_id": END, "bos_token_id": 57, "pad_token_id": PAD,
}  # fmt: skip
IMAGE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
BOTH = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 20}
CASES = {
    "clip": (T.CLIPModel, T.CLIPConfig(**BOTH)),
    "clip-legacy-end-gelu": (
        T.CLIPModel,
        T.CLIPConfig(text_config={**TEXT, "eos_token_id": 2}, vision_config={**IMAGE, "hidden_act": "gelu"}, projection_dim=20),
    ),
    "text": (T.CLIPTextModel, T.CLIPTextConfig(**TEXT)),
    "text-projected": (T.CLIPTextModelWithProjection, T.CLIPTextConfig(**TEXT, projection_dim=20)),
    "image": (T.CLIPVisionModel, T.CLIPVisionConfig(**IMAGE)),
    "image-projected": (T.CLIPVisionModelWithProjection, T.CLIPVisionConfig(**IMAGE, projection_dim=20)),
}
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _texts():
    """Texts of three lengths, each with its end, padded on the right."""
    ids = torch.randint(3, 57, (4, 10), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([10, 6, 8, 4])
    order = torch.arange(10)
    ids[order >= lengths[:, None]] = 1
    ids[torch.arange(4), lengths - 1] = END
    return {"input_ids": ids, "attention_mask": (order < lengths[:, None]).long()}


@pytest.fixture(params=sorted(CASES))
def theirs(request, tmp_path):
    model = random_model(*CASES[request.param]).eval()
    model.save_pretrained(tmp_path / "theirs")
    return model


def _close(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_layer_and_every_vector_are_equal(theirs, tmp_path, dtype, tolerance):
    theirs = theirs.to(dtype)
    theirs.set_attn_implementation("sdpa")
    ours = import_hf(tmp_path / "theirs", dtype=dtype)
    texts, pixels = _texts(), PIXELS.to(dtype)
    mask = texts["attention_mask"].bool()
    kind = theirs.config.model_type
    batch = (texts if kind != "clip_vision_model" else {}) | ({"pixel_values": pixels} if kind != "clip_text_model" else {})
    with torch.no_grad():
        reference = theirs(**batch, output_hidden_states=True)
        made = ours(batch, hiddens=True)
    if kind == "clip":
        parts = [(made.text, reference.text_model_output), (made.image, reference.vision_model_output)]
        _close(made.text_embeds, reference.text_embeds, tolerance)
        _close(made.image_embeds, reference.image_embeds, tolerance)
        _close(made.logits, reference.logits_per_image, tolerance)
        assert len(made.hiddens) == 5
    else:
        parts = [(made, reference)]
        if ours.head is not None:
            _close(made.logits, reference.text_embeds if kind == "clip_text_model" else reference.image_embeds, tolerance)
    for a, b in parts:
        real = mask if a.mask is not None else slice(None)
        for x, y in zip(a.hiddens, b.hidden_states[1:], strict=True):
            _close(x[real], y[real], tolerance)
        _close(a.hidden[real], b.last_hidden_state[real], tolerance)


@pytest.mark.parametrize("through_ours", [False, True])
def test_there_and_back_is_the_identity(theirs, tmp_path, through_ours):
    goes_and_comes_back(tmp_path / "theirs", type(theirs), through_ours)


@pytest.fixture
def clip(tmp_path):
    theirs = random_model(*CASES["clip"]).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, lw.load(tmp_path / "theirs")


def test_layers_of_both_towers_are_numbered_through(clip):
    theirs, ours = clip
    batch = _texts() | {"pixel_values": PIXELS}
    assert lw.view(ours).names == (*(f"text.stack.layers.{i}" for i in range(3)), *(f"image.stack.layers.{i}" for i in range(2)))
    depth, there = lw.depth_of(ours), lw.depth_of(theirs)
    assert depth["text.stack.layers.2.ffn.norm.weight"] == there["text_model.encoder.layers.2.layer_norm2.weight"] == 2
    assert depth["image.stack.layers.1.ffn.norm.weight"] == there["vision_model.encoder.layers.1.layer_norm2.weight"] == 4
    record = lw.record(ours, batch, hidden="all", inputs=[0])
    with torch.no_grad():
        made = ours(batch, hiddens=True)
    assert all(torch.equal(record.hidden[i], made.hiddens[i]) for i in range(5)) and torch.equal(record.output.logits, made.logits)
    with pytest.raises(BadInput, match=r"one tower at a time"):
        lw.record(ours, batch, attention=[0])


def test_a_path_runs_in_each_tower(clip):
    _, ours = clip
    batch = _texts() | {"pixel_values": PIXELS}
    with torch.no_grad():
        made = ours(batch, path=[0, 2, 4, 4])
        assert torch.equal(made.text.hidden, ours.text(batch, path=[0, 2]).hidden)
        assert torch.equal(made.image.hidden, ours.image(batch, path=[1, 1]).hidden)
        assert torch.equal(lw.view(ours).run(batch, path=[0, 2, 4, 4]).logits, made.logits)


def test_one_side_alone_and_what_it_cannot_do(clip):
    _, ours = clip
    only_text = ours(_texts())
    assert only_text.image is None and only_text.text_embeds.shape == (4, 20)
    with pytest.raises(BadInput, match="needs pixel_values and input_ids"):
        _ = only_text.logits


def test_a_tower_loses_a_layer_and_goes_out(clip, tmp_path):
    theirs, ours = clip
    change_config(tmp_path / "theirs", our_own_note="kept")
    ours = lw.load(tmp_path / "theirs")
    smaller = ours.with_towers(text=lw.edit.drop_layers(ours.text, layers=[1]))
    back = export_hf(load(save(smaller, tmp_path / "ours")), tmp_path / "back")
    loaded, info = T.CLIPModel.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()) and loaded.config.text_config.num_hidden_layers == 2 and loaded.config.text_config.bos_token_id == 57
    assert json.loads((back / "config.json").read_text())["our_own_note"] == "kept"
    batch = _texts() | {"pixel_values": PIXELS}
    with torch.no_grad():
        _close(smaller(batch).logits, loaded.eval()(**batch).logits_per_image, 1e-5)
    assert torch.equal(theirs.logit_scale, ours.logit_scale)


def test_a_fresh_one_starts_where_the_paper_does(clip, tmp_path):
    _, ours = clip
    fresh = build(ours.spec, seed=3)
    assert fresh.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    again = lw.load(export_hf(fresh, tmp_path / "fresh"))
    batch = _texts() | {"pixel_values": PIXELS}
    assert torch.equal(again(batch).logits, fresh.eval()(batch).logits)


def test_edits_of_the_whole_say_that_there_are_two(clip, tmp_path):
    _, ours = clip
    with pytest.raises(BadInput, match=r"two towers: work on model\.text or model\.image"):
        lw.edit.drop_layers(ours, layers=[1])


def test_a_tower_too_deep_to_be_true_is_refused_at_once(tmp_path):
    random_model(*CASES["clip"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change_config(tmp_path, text_config={**config["text_config"], "num_hidden_layers": 10**9})
    with pytest.raises(BadInput, match="at most 10000 layers"):
        import_hf(tmp_path)
