"""Packed bytes: as many as the bits need, and back without loss; NF4's levels and error."""

import pytest
import torch

from layerwise.errors import BadInput
from layerwise.nn.nf4 import dequantize, levels, quantize, sizes
from layerwise.nn.packing import BITS, pack, packed_bytes, unpack

# The published table (bitsandbytes, functional.py: create_normal_map), to six digits.
PUBLISHED = [-1.0, -0.696193, -0.525073, -0.394917, -0.284441, -0.184773, -0.091050, 0.0]
PUBLISHED += [0.079580, 0.160930, 0.246112, 0.337915, 0.440710, 0.562617, 0.722957, 1.0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 7, 64, 101])
def test_packing_is_lossless_in_exactly_the_bytes_that_the_bits_need(bits, count):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count))
    made = pack(codes, bits)
    assert made.dtype == torch.uint8 and made.numel() == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack(made, bits, count), codes.to(torch.uint8))


def test_other_widths_are_refused():
    with pytest.raises(BadInput, match="1, 2, 3, 4 or 8"):
        pack(torch.zeros(3), 5)


def test_the_levels_are_the_published_ones():
    torch.testing.assert_close(levels(), torch.tensor(PUBLISHED), atol=2e-6, rtol=0)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(16, 64), (5, 33)])
def test_every_number_becomes_the_nearest_level_of_its_block(double, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight, 64, double)
    back = dequantize(packed, shape, 64)
    expected = []
    for i, block in enumerate(weight.flatten().split(64)):
        scale = block.abs().max()
        if double:  # the scale as it was kept
            scale = (packed.scales[i].float() - 128) * packed.second[1] + packed.second[0]
        nearest = ((block / scale)[:, None] - levels()).abs().argmin(dim=1)
        expected.append(levels()[nearest] * scale)
    torch.testing.assert_close(back.flatten(), torch.cat(expected), atol=1e-6, rtol=1e-5)
    assert (packed.codes.numel(), packed.scales.numel(), 0 if packed.second is None else packed.second.numel()) == sizes(
        weight.numel(), 64, double
    )


def test_quantizing_what_was_quantized_changes_nothing_and_zeros_stay():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    once = dequantize(quantize(weight), weight.shape)
    torch.testing.assert_close(dequantize(quantize(once), weight.shape), once)
    assert dequantize(quantize(torch.zeros(4, 64)), (4, 64)).abs().max() == 0


def test_double_quantization_takes_4_127_bits_a_number():
    codes, scales, second = sizes(4096 * 4096, 64, True)
    assert 8 * (codes + scales + 4 * second) / 4096**2 == pytest.approx(4.127, abs=1e-3)
