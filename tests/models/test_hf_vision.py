"""Vision transformers and convolutional networks, exact in both directions."""

import json

import pytest
import torch
import transformers as T
from hf_reference import config_of, random_model, tensors_of
from torch import nn

from layerwise.models.checkpoint import load, save
from layerwise.models.hf import export_hf, import_hf

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
    model = import_hf(tmp_path / "theirs")
    if through_ours:
        model = load(save(model, tmp_path / "ours"))
    back = export_hf(model, tmp_path / "back")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(back)
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
    assert config_of(back) == config_of(tmp_path / "theirs")
    _, info = type(theirs).from_pretrained(back, output_loading_info=True)
    assert not any(info.values())


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
