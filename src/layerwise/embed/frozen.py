"""Token vectors that are computed once and never trained: from pictures of the tokens, or from the digits of their ids."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

SCRIPTS = ("LATIN", "GREEK", "CYRILLIC", "ARMENIAN")
SEED = 42
CODE_BITS = 16


class FrozenTable(nn.Module):
    """A lookup like `nn.Embedding` whose vectors are a buffer: no gradient, no optimizer, in every checkpoint."""

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", torch.empty(count, size))

    def forward(self, ids: Int[Tensor, "b s"]) -> Float[Tensor, "b s size"]:
        return F.embedding(ids, self.weight)


def glyph_bits(strings: Sequence[str], cell: int = 16) -> Float[np.ndarray, "n bits"]:
    """Black (1) and white (0) of each string's picture, `cell` x `cell`, read outward from the centre: by radius, then angle.

    Each character is drawn centred in a cell of its own; letters are turned, shifted, blurred and speckled a little, the same way
    in every picture, because the random numbers begin anew with each string. Longer strings are squeezed to one cell. A character
    that the font (Pillow's own) does not have is drawn as its code, 4 x 4 squares (GNU Unifont writes the code out).

    Source: the tokenizer notebooks of AVBochkov/Embeddings (Bochkov 2025, arXiv 2507.07129), there with Unifont at 32 x 32.
    """
    rows = np.arange(cell) - (cell - 1) / 2
    y, x = np.meshgrid(rows, rows, indexing="ij")
    order = np.lexsort((np.arctan2(y, x).ravel(), np.round(np.hypot(x, y), 6).ravel()))
    return np.stack([_picture(s or " ", cell).ravel()[order] for s in strings]).astype(np.float64)


def _picture(string: str, cell: int) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    font = ImageFont.load_default(cell * 0.85)
    missing = font.getmask("\U0010ffff").getbbox(), bytes(font.getmask("\U0010ffff"))
    image = Image.new("L", (cell * len(string), cell), 255)
    draw = ImageDraw.Draw(image)
    there = True
    for i, character in enumerate(string):
        mask = font.getmask(character)
        there = (mask.getbbox(), bytes(mask)) != missing and (mask.getbbox() is not None or character == " ")
        if there:
            draw.text((cell * i + cell / 2, cell / 2), character, fill=0, font=font, anchor="mm")
        else:
            code = np.array([(ord(character) >> bit) & 1 for bit in range(CODE_BITS)], dtype=bool).reshape(4, 4)
            block = np.kron(code, np.ones((cell // 4, cell // 4), dtype=bool))
            image.paste(Image.fromarray(np.where(block, 0, 255).astype(np.uint8)), (cell * i, 0))
    random = np.random.default_rng(SEED)
    letters = there and unicodedata.name(string[0], "").startswith(SCRIPTS)
    if letters:
        image = image.rotate(random.uniform(-4, 4), fillcolor=255)
        shift = [round(v * cell / 32) for v in random.integers(-2, 3, size=2)]
        image = image.transform(image.size, Image.Transform.AFFINE, (1, 0, shift[0], 0, 1, shift[1]), fillcolor=255)
        image = image.filter(ImageFilter.GaussianBlur(0.5))
    pixels = np.array(image)
    pixels[random.random(pixels.shape) < (0.01 if letters else 0.001)] = 0
    if len(string) > 1:
        pixels = np.array(Image.fromarray(pixels).resize((cell, cell), Image.Resampling.BILINEAR))
    return pixels < 128


def glyph_table(strings: Sequence[str], size: int, cell: int = 16) -> Float[Tensor, "n size"]:
    """Vectors of norm 1 from the strings' pictures: bits, centred, turned to their principal axes, the first `size` of them.

    With at least as many dimensions as bits nothing is lost: distances between centred bits stay (before the norms become 1).
    """
    return F.normalize(principal(glyph_bits(strings, cell), size), dim=1).float()


def principal(bits: Float[np.ndarray, "n bits"], size: int) -> Float[Tensor, "n size"]:
    """Centred rows on their principal axes, zeros where there are fewer axes than `size`. Each axis points to its largest weight."""
    centred = torch.from_numpy(bits - bits.mean(axis=0))
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    scores = centred @ axes[:size].T
    return F.pad(scores, (0, size - scores.shape[1]))


def binary_table(count: int, size: int) -> Float[Tensor, "n size"]:
    """Vectors of norm 1 from the 16 binary digits of each id, lifted by a fixed random matrix: of rank 16 at most.

    Source: Bochkov 2025, "Growing Transformers" (arXiv 2507.07129), version 3.
    """
    digits = (torch.arange(count)[:, None] >> torch.arange(CODE_BITS)) & 1
    lift = torch.randn(CODE_BITS, size, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return F.normalize((2 * digits - 1).double() @ lift, dim=1).float()
