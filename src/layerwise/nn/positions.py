"""How attention knows where things are: rotary angles, ALiBi slopes, T5's relative buckets, offsets on a grid, sinusoids."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from layerwise.stack.parts_spec import RopeScaling


def rotary_angles(positions: Int[Tensor, "*b s"], head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each (*b, s, head_dim), float32.

    Frequencies theta^(-2i/d); the two halves of a head are rotated against each other, as in Llama checkpoints.
    Source: Su et al. 2021, "RoFormer", section 3.4.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    # The reciprocal of the power, as transformers computes it: the other way round differs in the last float32 digit.
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = _stretched(frequencies, scaling)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _stretched(frequencies: Float[Tensor, " d"], scaling: RopeScaling) -> Float[Tensor, " d"]:
    """Rotary frequencies for longer texts, see `RopeScaling`."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original / (2 * math.pi / frequencies)
    blend = (turns - scaling.low) / (scaling.high - scaling.low)
    between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slow = torch.where(turns < scaling.low, frequencies / scaling.factor, between)
    return torch.where(turns > scaling.high, frequencies, slow)


def rotate(x: Float[Tensor, "b h s d"], cos: Tensor, sin: Tensor) -> Float[Tensor, "b h s d"]:
    """`x` turned by the rotary angles; cos and sin broadcast over heads. Dimensions beyond theirs stay as they are."""
    turned = cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat([rotate(x[..., :turned], cos, sin), x[..., turned:]], dim=-1)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def alibi_slopes(heads: int) -> Float[Tensor, " heads"]:
    """ALiBi's slope for every head: 2^(-8i/n), and for n not a power of two the published interleaving.

    Source: Press et al. 2022, "Train Short, Test Long", section 3 and its footnote.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes)


def relative_bucket(distance: Int[Tensor, ...], bidirectional: bool, buckets: int, max_distance: int) -> Int[Tensor, ...]:
    """T5's bucket for `distance` = key position - query position: exact when near, logarithmic when far.

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.1.
    """
    offset = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    far = (exact + far.long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """T5's learned bias on attention scores, one number a head and bucket, shared by all layers of a stack."""

    def __init__(self, heads: int, bidirectional: bool, buckets: int, max_distance: int) -> None:
        super().__init__()
        self.bidirectional, self.buckets, self.max_distance = bidirectional, buckets, max_distance
        self.weight = nn.Parameter(torch.empty(buckets, heads))

    def forward(self, distance: Int[Tensor, "b q k"]) -> Float[Tensor, "b h q k"]:
        bucket = relative_bucket(distance, self.bidirectional, self.buckets, self.max_distance)
        return self.weight[bucket].permute(0, 3, 1, 2)


class GridBias(nn.Module):
    """A learned bias on attention scores for every offset between two patches of an image, one number a head; and three for the class token.

    Position 0 is the class token, then come the patches row by row. The last three rows of the table are: from the class token to a
    patch, from a patch to the class token, the class token to itself. A grid of another size than the table's gets it interpolated
    bilinearly. Source: Bao et al. 2022, "BEiT", appendix A, and the published code; the interpolation is MiDaS v3.1's.
    """

    def __init__(self, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(torch.empty((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, heads))

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "h n n"]:
        """The bias for all pairs of positions of an image of `grid` (rows, columns) of patches, n = rows x columns + 1."""
        table: Tensor = self.weight
        if grid != self.grid:
            offsets = table[:-3].unflatten(0, (2 * self.grid[0] - 1, 2 * self.grid[1] - 1)).permute(2, 0, 1)[None]
            resized = nn.functional.interpolate(offsets, size=(2 * grid[0] - 1, 2 * grid[1] - 1), mode="bilinear")
            table = torch.cat([resized[0].flatten(1).T, table[-3:]])
        return table[grid_offsets(grid, table.device)].permute(2, 0, 1)


def grid_offsets(grid: tuple[int, int], device: torch.device | None = None) -> Int[Tensor, "n n"]:
    """The row of a `GridBias` table for every pair (query, key) of positions."""
    rows, columns = (torch.arange(n, device=device) for n in grid)
    places = torch.cartesian_prod(rows, columns)
    down, right = (places[:, None, i] - places[None, :, i] + grid[i] - 1 for i in range(2))
    last = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    found = torch.full((len(places) + 1, len(places) + 1), last, device=device)
    found[1:, 1:] = down * (2 * grid[1] - 1) + right
    found[1:, 0] = last + 1
    found[0, 0] = last + 2
    return found


def sinusoids(positions: Int[Tensor, "*b s"], width: int) -> Float[Tensor, "*b s width"]:
    """Fixed sine/cosine position vectors, sines in the first half; an odd width ends in 0. Source: Vaswani et al. 2017, section 3.5."""
    half = width // 2
    # In float32 the angle of position 500 is off by 3e-5 already; tables are made in float64 and rounded once.
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    angles = positions[..., None].to(wide) / 10000.0 ** (torch.arange(half, device=positions.device, dtype=wide) / half)
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=-1).float(), (0, width % 2))
