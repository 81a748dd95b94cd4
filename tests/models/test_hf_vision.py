"""Vision transformers and convolutional networks, exact in both directions."""

import dataclasses
import json

import pytest
import torch
import transformers as T
from hf_reference import change_config, goes_and_comes_back, random_model, tensors_of
from safetensors.torch import save_file
from torch import nn

import layerwise as lw
from layerwise.edit.head import classifier_head
from layerwise.errors import BadInput
from layerwise.models.hf import FAMILIES, export_hf, import_hf
from layerwise.models.model import build
from layerwise.table import lookup

VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
DEIT = {**VIT, "intermediate_size": 48}
CONV = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2]}
BIT = {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [2, 2], "num_groups": 4}
OWN, SHARED = {"use_relative_position_bias": True}, {"use_shared_relative_position_bias": True}
CASES = {
    "vit": (T.ViTForImageClassification, T.ViTConfig(**DEIT, num_labels=5)),
    "vit-base": (T.ViTModel, T.ViTConfig(**DEIT, qkv_bias=False, hidden_act="gelu_new", num_channels=1)),
    "vit-oblong": (T.ViTModel, T.ViTConfig(**DEIT | {"image_size": [16, 24], "patch_size": [4, 8]})),
    "vit-masked": (T.ViTForMaskedImageModeling, T.ViTConfig(**DEIT, encoder_stride=4)),
    "deit": (T.DeiTForImageClassification, T.DeiTConfig(**DEIT)),
    "deit-distilled": (T.DeiTForImageClassificationWithTeacher, T.DeiTConfig(**DEIT, num_labels=3)),
    "deit-base": (T.DeiTModel, T.DeiTConfig(**DEIT)),
    "deit-masked": (T.DeiTForMaskedImageModeling, T.DeiTConfig(**DEIT, encoder_stride=4)),
    "dinov2": (T.Dinov2ForImageClassification, T.Dinov2Config(**VIT, mlp_ratio=2)),
    "dinov2-base-swiglu": (T.Dinov2Model, T.Dinov2Config(**VIT, use_swiglu_ffn=True, use_mask_token=False, drop_path_rate=0.1)),
    "dinov2-registers": (T.Dinov2WithRegistersForImageClassification, T.Dinov2WithRegistersConfig(**VIT, num_register_tokens=3)),
    "dinov2-registers-base-swiglu": (T.Dinov2WithRegistersModel, T.Dinov2WithRegistersConfig(**VIT, use_swiglu_ffn=True)),
    "beit": (T.BeitForImageClassification, T.BeitConfig(**DEIT, **OWN)),
    "beit-shared-first": (T.BeitForImageClassification, T.BeitConfig(**DEIT, **SHARED, use_mean_pooling=False, layer_scale_init_value=0.0)),
    "beit-base-absolute": (T.BeitModel, T.BeitConfig(**DEIT, use_absolute_position_embeddings=True, use_mask_token=True)),
    "beit-masked": (
        T.BeitForMaskedImageModeling,
        T.BeitConfig(**DEIT, **SHARED, use_mask_token=True, use_mean_pooling=False, vocab_size=20),
    ),
    "resnet": (T.ResNetForImageClassification, T.ResNetConfig(**CONV, num_labels=4)),
    "resnet-basic": (T.ResNetForImageClassification, T.ResNetConfig(**CONV | {"embedding_size": 16}, layer_type="basic")),
    "resnet-base-early-strides": (
        T.ResNetModel,
        T.ResNetConfig(**CONV, downsample_in_bottleneck=True, downsample_in_first_stage=True, num_channels=1),
    ),
    "bit": (T.BitForImageClassification, T.BitConfig(**BIT, num_labels=4)),
    "bit-after": (T.BitForImageClassification, T.BitConfig(**BIT, layer_type="bottleneck")),
    "bit-base-same": (T.BitModel, T.BitConfig(**BIT, global_padding="SAME", embedding_dynamic_padding=True)),
    "bit-same-after-dilated": (
        T.BitModel,
        T.BitConfig(
            **BIT | {"hidden_sizes": [32, 32, 64], "depths": [1, 2, 2]}, global_padding="same", layer_type="bottleneck", output_stride=4
        ),
    ),
}
CONVOLUTIONAL = ("resnet", "bit")


def images_for(config, batch=2, more=0):
    """Noise of the size that a config names (`more` pixels larger)."""
    size = getattr(config, "image_size", 33)
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, config.num_channels, height + more, width + more, generator=generator)


def reference_model(name):
    """A case's model with every parameter drawn anew, and running statistics off their defaults."""
    model = random_model(*CASES[name])
    torch.manual_seed(2)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            part.num_batches_tracked += 3
    return model


@pytest.fixture(params=sorted(CASES))
def case(request, tmp_path):
    model = reference_model(request.param)
    model.save_pretrained(tmp_path / "theirs")
    return request.param, model


def _close(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max())))


def _same_outputs(ours, theirs, pixels, tolerance):
    with torch.no_grad():
        reference = theirs(pixel_values=pixels, output_hidden_states=True)
        made = ours({"pixel_values": pixels}, hiddens=True)
    hiddens = made.hiddens
    if theirs.config.model_type in CONVOLUTIONAL:  # theirs keeps what leaves a stage
        ends = torch.tensor(theirs.config.depths).cumsum(0) - 1
        hiddens = [hiddens[i] for i in ends]
    assert len(hiddens) == len(reference.hidden_states) - 1
    for a, b in zip(hiddens, reference.hidden_states[1:], strict=True):
        _close(a, b, tolerance)
    if "last_hidden_state" in reference:
        _close(made.hidden, reference.last_hidden_state, tolerance)
    if ours.head is not None:
        _close(made.logits, reference.logits, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_layer_and_the_logits_are_equal(case, tmp_path, dtype, tolerance):
    _, theirs = case
    theirs = theirs.to(dtype)
    if theirs.config.model_type not in CONVOLUTIONAL:
        theirs.set_attn_implementation("sdpa")
    ours = import_hf(tmp_path / "theirs", dtype=dtype)
    _same_outputs(ours, theirs, images_for(theirs.config).to(dtype), tolerance)


@pytest.mark.parametrize("through_ours", [False, True])
def test_there_and_back_is_the_identity(case, tmp_path, through_ours):
    _, theirs = case
    goes_and_comes_back(tmp_path / "theirs", type(theirs), through_ours)


def test_a_model_without_an_origin_is_written_just_the_same(case, tmp_path):
    name, theirs = case
    model = import_hf(tmp_path / "theirs")
    model.__dict__["origin"] = None
    back = export_hf(model, tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["model_type"] == theirs.config.model_type
    if "masked" not in name:  # their heads for hidden patches are only carried along
        loaded = type(theirs).from_pretrained(back).eval()
        pixels = images_for(theirs.config)
        with torch.no_grad():
            a, b = loaded(pixel_values=pixels), theirs(pixel_values=pixels)
        key = "logits" if "logits" in b else "last_hidden_state"
        assert torch.equal(a[key], b[key])


OTHER_SIZES = {
    "vit": {"interpolate_pos_encoding": True},
    "deit": {"interpolate_pos_encoding": True},
    "dinov2": {},
    "dinov2-registers": {},
    "beit": {},
    "beit-shared-first": {},
    "beit-base-absolute": {},
}


@pytest.mark.parametrize("more", [-4, 8])
@pytest.mark.parametrize("name", OTHER_SIZES)
def test_images_of_other_sizes_get_the_same_interpolated_positions(name, more, tmp_path):
    theirs = reference_model(name).double()
    theirs.save_pretrained(tmp_path)
    ours = import_hf(tmp_path)
    pixels = images_for(theirs.config, more=more).double()
    with torch.no_grad():
        reference = theirs(pixels, output_hidden_states=True, **OTHER_SIZES[name])
        made = ours({"pixel_values": pixels}, hiddens=True)
    # DINOv2's code interpolates in float32 whatever the weights are.
    tolerance = 1e-5 if name.startswith("dinov2") else 1e-10
    for a, b in zip(made.hiddens, reference.hidden_states[1:], strict=True):
        _close(a, b, tolerance)


@pytest.mark.parametrize("name", ["vit-masked", "deit-masked", "beit-masked", "beit-base-absolute", "dinov2", "dinov2-registers"])
def test_hidden_patches_are_replaced_by_the_mask_token(name, tmp_path):
    theirs = reference_model(name)
    theirs.save_pretrained(tmp_path)
    ours = import_hf(tmp_path)
    pixels = images_for(theirs.config)
    masked = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.4
    with torch.no_grad():
        reference = theirs.base_model(pixels, bool_masked_pos=masked)
        made = ours({"pixel_values": pixels, "bool_masked_pos": masked})
    _close(made.hidden, reference.last_hidden_state, 1e-5)


DROPPED = {
    "vit": [1],
    "deit-distilled": [0],
    "dinov2": [2],
    "beit": [1],
    "beit-shared-first": [0],
    "resnet": [1],
    "resnet-basic": [3],
    "bit": [3],
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_model_without_some_layers_goes_out_and_keeps_its_labels(name, tmp_path):
    theirs = reference_model(name)
    labels = {i: f"kind {i}" for i in range(theirs.config.num_labels)}
    theirs.config.id2label, theirs.config.label2id = labels, {v: k for k, v in labels.items()}
    theirs.save_pretrained(tmp_path / "theirs")
    model = import_hf(tmp_path / "theirs")
    smaller = lw.edit.drop_layers(model, layers=DROPPED[name])
    loaded, info = type(theirs).from_pretrained(export_hf(smaller, tmp_path / "back"), output_loading_info=True)
    assert not any(info.values()) and loaded.config.id2label == labels
    pixels = images_for(theirs.config)
    kept = [i for i in range(model.stack.depth) if i not in DROPPED[name]]
    with torch.no_grad():
        expected = loaded.eval()(pixel_values=pixels).logits
        _close(smaller({"pixel_values": pixels}).logits, expected, 1e-5)
        _close(model({"pixel_values": pixels}, path=kept).logits, expected, 1e-5)


@pytest.mark.parametrize("name", ["dinov2-registers", "beit", "resnet", "bit"])
def test_layers_are_recorded(name, tmp_path):
    theirs = reference_model(name)
    theirs.save_pretrained(tmp_path)
    ours = import_hf(tmp_path)
    batch = {"pixel_values": images_for(theirs.config)}
    record = lw.record(ours, batch, hidden="all", inputs=[0])
    with torch.no_grad():
        made = ours(batch, hiddens=True)
        assert torch.equal(record.inputs[0], ours.embedding(batch))
    assert all(torch.equal(record.hidden[i], h) for i, h in enumerate(made.hiddens))
    if name in ("resnet", "bit"):
        foreign = lw.record(theirs, batch, hidden="all")
        for i, h in enumerate(made.hiddens):
            _close(h, foreign.hidden[i], 1e-5)


@pytest.mark.parametrize("name", ["beit", "beit-shared-first"])
def test_recorded_attention_is_the_one_that_runs(name, tmp_path):
    reference_model(name).save_pretrained(tmp_path)
    ours = import_hf(tmp_path)
    batch = {"pixel_values": torch.rand(2, 3, 16, 16)}
    record = lw.record(ours, batch, hidden="all", attention="all")
    plain = lw.record(ours, batch, hidden="all")
    for i in range(3):
        torch.testing.assert_close(record.hidden[i], plain.hidden[i], rtol=0, atol=1e-5)
        torch.testing.assert_close(record.attention[i].sum(-1), torch.ones(2, 4, 17))


@pytest.mark.parametrize("name", ["resnet", "resnet-basic", "bit", "bit-after"])
def test_parameters_lie_as_deep_as_in_transformers(name, tmp_path):
    theirs = reference_model(name)
    theirs.save_pretrained(tmp_path)
    ours = import_hf(tmp_path)
    there, here = lw.depth_of(theirs), lw.depth_of(ours)
    family = lookup(FAMILIES, theirs.config.model_type, "family")
    pairs = [p for p in family.pairs(ours.spec) if p.theirs in there]
    assert len(pairs) == len(there) and all(here[p.ours[0]] == there[p.theirs] for p in pairs)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_shards_are_read_and_written(name, tmp_path):
    theirs = reference_model(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    back = export_hf(import_hf(tmp_path / "theirs"), tmp_path / "back", shard_bytes=10_000)
    assert len(list(back.glob("model-*.safetensors"))) > 1
    _, info = type(theirs).from_pretrained(back, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("name", ["beit", "bit"])
def test_tensors_that_have_no_place_are_named(name, tmp_path):
    reference_model(name).save_pretrained(tmp_path)
    save_file({**tensors_of(tmp_path), "neck.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match=r"unexpected neck\.weight"):
        import_hf(tmp_path)


@pytest.mark.parametrize("name", ["dinov2", "bit", "resnet"])
def test_the_dtype_is_kept(name, tmp_path):
    theirs = reference_model(name).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = import_hf(tmp_path / "theirs")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(export_hf(ours, tmp_path / "back"))
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}
    assert ours({"pixel_values": images_for(theirs.config)}).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vit", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ("vit", {"image_size": "large"}, r"config\.json"),
        ("vit", {"image_size": 3}, "patch is at least 1 x 1 and at most the image"),
        ("vit", {"architectures": ["ViTForSegmentation"]}, r"ViTForSegmentation has a head.*ViTForImageClassification"),
        ("beit", {"image_size": [16, 24]}, "only square ones"),
        ("beit", {"use_shared_relative_position_bias": True}, "a shared one on top"),
        ("resnet", {"depths": [1]}, "one number a stage"),
        ("resnet", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("bit", {"global_padding": "VALID"}, "global_padding is 'VALID'"),
        ("bit", {"hidden_sizes": [30, 64]}, "multiples of 8"),
        ("bit", {"depths": [0, 2]}, "each depth 1 or more"),
    ],
)
def test_configs_that_cannot_be_read_are_named(name, change, message, tmp_path):
    reference_model(name).save_pretrained(tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(BadInput, match=message):
        import_hf(tmp_path)


def test_a_feed_forward_that_no_dinov2_has_is_refused(tmp_path):
    reference_model("dinov2").save_pretrained(tmp_path / "theirs")
    spec = import_hf(tmp_path / "theirs").spec
    layer = dataclasses.replace(spec.stack.layer, ffn_width=50)
    odd = build(dataclasses.replace(spec, stack=dataclasses.replace(spec.stack, layer=layer)))
    with pytest.raises(BadInput, match=r"no whole multiple of the stream's 32|Save it in layerwise's own format"):
        export_hf(odd, tmp_path / "out")


def _saved(net, folder):
    net.save_pretrained(folder)
    return import_hf(folder)


def test_a_fresh_head_leaves_behind_what_stood_beside_the_old_one(tmp_path):
    """Neither a pooler that the new head does not read, nor the names of other classes."""
    head = {"classes": 3, "pool": "first"}
    out = export_hf(classifier_head(_saved(T.ViTModel(T.ViTConfig(**DEIT)), tmp_path / "base"), **head), tmp_path / "of-base")
    assert not [name for name in tensors_of(out) if "pooler" in name]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]
    named = T.ViTConfig(**DEIT, id2label={0: "jay", 1: "crow", 2: "rook"}, label2id={"jay": 0, "crow": 1, "rook": 2})
    out = export_hf(classifier_head(_saved(T.ViTForImageClassification(named), tmp_path / "named"), **head), tmp_path / "of-named")
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert T.ViTForImageClassification.from_pretrained(out).config.num_labels == 3


@pytest.mark.parametrize("name", ["vit-masked", "deit-masked"])
def test_a_mask_token_under_a_classifier_is_refused_and_not_written_as_another_class(tmp_path, name):
    kind, config = CASES[name]
    model = classifier_head(_saved(kind(config), tmp_path / "masked"), classes=3, pool="first")
    with pytest.raises(BadInput, match="mask_token"):
        export_hf(model, tmp_path / "out")
