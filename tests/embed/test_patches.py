"""Patches and stems: what enters a stack of an image."""

import pytest
import torch
from torch.nn import functional as F

from layerwise.embed.patches import PatchEmbedding
from layerwise.embed.spec import PatchSpec, StemSpec
from layerwise.embed.stem import StemEmbedding
from layerwise.errors import BadInput


def _patches(**given):
    spec = PatchSpec(**{"channels": 2, "size": (8, 12), "patch": (4, 3), **given})
    embedding = PatchEmbedding(spec, 6)
    embedding.initialize(0.5, torch.Generator().manual_seed(0))
    return embedding.eval()


IMAGES = torch.rand(3, 2, 8, 12, generator=torch.Generator().manual_seed(1))


def test_a_patch_is_a_linear_map_of_its_pixels():
    embedding = _patches(class_token=False, position="none")
    pixels = F.unfold(IMAGES, (4, 3), stride=(4, 3)).transpose(1, 2)
    expected = F.linear(pixels, embedding.project.weight.flatten(1), embedding.project.bias)
    torch.testing.assert_close(embedding({"pixel_values": IMAGES}), expected)


def test_tokens_stand_in_front_and_registers_have_no_position():
    embedding = _patches(distill_token=True, registers=2)
    out = embedding({"pixel_values": IMAGES})
    assert out.shape == (3, 4 + 8, 6) and embedding.spec.prefix == 4
    places = embedding.positions
    assert torch.equal(out[:, 0], (embedding.class_token + places[0]).expand(3, -1))
    assert torch.equal(out[:, 1], (embedding.distill_token + places[1]).expand(3, -1))
    assert torch.equal(out[:, 2:4], embedding.registers.expand(3, -1, -1))
    plain = _patches(class_token=False, position="none")
    plain.project = embedding.project
    torch.testing.assert_close(out[:, 4:], plain({"pixel_values": IMAGES}) + places[2:])


def test_hidden_patches_show_nothing_of_the_image():
    embedding = _patches(mask_token=True)
    hidden = torch.zeros(3, 8, dtype=torch.bool)
    hidden[:, 2] = True
    with torch.no_grad():
        embedding.mask_token.fill_(0.3)
    changed = IMAGES.clone()
    changed[:, :, :4, 6:9] += 1  # the third patch
    a, b = (embedding({"pixel_values": x, "bool_masked_pos": hidden}) for x in (IMAGES, changed))
    assert torch.equal(a, b) and torch.equal(a[0, 3], embedding.mask_token + embedding.positions[3])
    assert not torch.equal(embedding({"pixel_values": IMAGES}), embedding({"pixel_values": changed}))
    with pytest.raises(BadInput, match="no(ne| mask token)|has none"):
        _patches()({"pixel_values": IMAGES, "bool_masked_pos": hidden})


def test_equal_positions_stay_equal_and_a_ramp_stays_in_order_on_a_finer_grid():
    embedding = _patches(size=(32, 24))
    with torch.no_grad():
        embedding.positions[1:] = 0.7
        torch.testing.assert_close(embedding.positions_for((5, 11))[1:], torch.full((55, 6), 0.7))
        embedding.positions[1:] = torch.arange(8.0).repeat_interleave(8)[:, None].expand(-1, 6)
    places = embedding.positions_for((16, 8))
    rows = places[1:, 0].unflatten(0, (16, 8))
    torch.testing.assert_close(rows, rows[:, :1].expand(-1, 8))
    assert (rows[:, 0].diff() > 0).all() and (rows[:, 0] + rows[:, 0].flip(0)).allclose(torch.tensor(7.0), atol=1e-5)
    assert torch.equal(places[0], embedding.positions[0])


def test_other_channels_and_images_without_a_patch_are_refused():
    for wrong in (torch.rand(1, 3, 8, 12), torch.rand(1, 2, 3, 12)):
        with pytest.raises(BadInput, match=r"images are \(batch, 2, at least 4, at least 3\)"):
            _patches()({"pixel_values": wrong})


@pytest.mark.parametrize(
    "given", [{"patch": (9, 1)}, {"patch": (0, 1)}, {"class_token": False, "distill_token": True}, {"registers": -1}, {"std": 0.0}]
)
def test_impossible_embeddings_are_refused(given):
    with pytest.raises(BadInput):
        PatchSpec(**{"channels": 2, "size": (8, 12), "patch": (4, 3), **given})


def _stem(**given):
    stem = StemEmbedding(StemSpec(**{"channels": 1, "width": 4, "norm": "none", **given}))
    stem.initialize(None, torch.Generator().manual_seed(0))
    return stem.eval()


def test_zeros_around_a_negative_map_win_unlike_padding_of_the_pooling():
    """Big Transfer's root: where everything is negative, the border of the pooled map is 0 (card check 8)."""
    images = torch.ones(1, 1, 32, 32)
    zero, most = _stem(pool="zero"), _stem(pool="max")
    for stem in (zero, most):
        with torch.no_grad():
            stem.convolution.weight.fill_(-1.0)
    a, b = zero({"pixel_values": images}), most({"pixel_values": images})
    assert a.shape == b.shape == (1, 4, 8, 8)
    assert (a[..., 0, :] == 0).all() and (a[..., 1:, 1:] < 0).all() and (b < 0).all()


@pytest.mark.parametrize("height", [31, 32, 33])
def test_same_padding_makes_half_of_everything_rounded_up(height):
    stem = _stem(pool="same", padding="same")
    assert stem({"pixel_values": torch.rand(1, 1, height, 20)}).shape[-2:] == ((height + 3) // 4, 5)


def test_a_stem_norms_and_rectifies():
    stem, images = _stem(norm="group", groups=2, pool="none"), torch.rand(2, 1, 9, 9)
    expected = F.relu(F.group_norm(F.conv2d(images, stem.convolution.weight, stride=2, padding=3), 2))
    torch.testing.assert_close(stem({"pixel_values": images}), expected)
    with pytest.raises(BadInput, match=r"images are \(batch, 1, height, width\)"):
        stem({"pixel_values": torch.rand(2, 3, 9, 9)})
