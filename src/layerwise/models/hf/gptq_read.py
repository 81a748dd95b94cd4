"""Reading matrices in the format of GPTQ checkpoints, byte for byte: as they are packed there, they are packed here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.models.hf.family import Family, Pair, shapes_of
from layerwise.models.hf.layouts import TURNED
from layerwise.models.spec import ModelSpec
from layerwise.nn.integers import WIDTHS
from layerwise.nn.packing import pack, unpack
from layerwise.stack.parts_spec import LinearSpec
from layerwise.stack.spec import StackSpec

PARTS = ("qweight", "qzeros", "scales")
Place = tuple[int, str]
"""A layer's number and the role of one of its matrices."""
_NAME = re.compile(r"stack\.layers\.(\d+)\.(?:mixer|ffn)\.branch\.(\w+)\.weight")


@dataclass(frozen=True)
class Settings:
    """What a checkpoint's quantization_config says about all of its matrices.

    Attributes:
        group: inputs that share a scale (None: all). second: zeros are stored as they are, in the first version of the format less one.
        indexed: columns were rounded in the order of their activations, so that `g_idx` tells the group of every input.
    """

    group: int | None
    second: bool
    indexed: bool


def read_settings(config: Mapping[str, Any]) -> Settings | None:
    """The settings in a config.json; None where its weights are not quantized.

    Raises:
        BadInput: they are quantized otherwise.
    """
    found = config.get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    form = found.get("checkpoint_format", "gptq") if isinstance(found, dict) else None
    if method != "gptq" or form not in ("gptq", "gptq_v2"):
        raise BadInput(
            f"its weights are quantized (quant_method {method!r}, checkpoint_format {form!r}); layerwise reads plain ones and gptq or gptq_v2: "
            "dequantize it and save it with transformers"
        )
    group = found.get("group_size", -1)
    if not isinstance(group, int):
        raise BadInput(f"quantization_config: group_size is a number; it is {group!r}")
    return Settings(group if group > 0 else None, form == "gptq_v2", bool(found.get("desc_act")) and group > 0)


def packed_linears(family: Family, spec: ModelSpec, sizes: Mapping[str, tuple[int, ...]], settings: Settings) -> dict[Place, LinearSpec]:
    """How each packed matrix is stored, told by the sizes of a checkpoint's tensors. (The config's own list of exceptions is a list of
    regular expressions, which are better not run.)

    Raises:
        BadInput: something else than matrices of layers is packed, or sizes are none that the format has.
    """
    found = {}
    for pair, stem, shapes in _packed_pairs(family, spec, sizes):
        inner = shapes[0].shape[1]
        size = {part: sizes.get(f"{stem}.{part}", ()) for part in PARTS}
        bits = 32 * size["qweight"][0] // inner if len(size["qweight"]) == 2 else 0
        groups = size["scales"][0] if len(size["scales"]) == 2 else 0
        group = settings.group
        if groups and -(-inner // (group or inner)) != groups:
            group = -(-inner // groups)
        outer = sum(map(len, shapes))
        expected = {"qweight": (inner * bits // 32, outer), "qzeros": (groups, outer * bits // 32), "scales": (groups, outer)}
        if bits not in WIDTHS or size != expected or -(-inner // (group or inner)) != groups or (inner * bits) % 32 or (outer * bits) % 32:
            raise BadInput(f"{stem}: {size} are not the sizes of a matrix of {outer} x {inner} in the GPTQ format")
        for name in pair.ours:
            place = _place(name, stem)
            found[place] = LinearSpec("packed", bits=bits, group=group, indexed=settings.indexed and group is not None)
    return found


def with_linears(spec: ModelSpec, linears: Mapping[Place, LinearSpec]) -> ModelSpec:
    """The description with those matrices packed."""
    assert isinstance(spec.stack, StackSpec)
    layers = [
        dataclasses.replace(layer, linears={**layer.linears, **{role: s for (at, role), s in linears.items() if at == i}})
        for i, layer in enumerate(spec.stack.layers)
    ]
    return dataclasses.replace(spec, stack=spec.stack.with_layers(layers))


def take_packed(
    family: Family, spec: ModelSpec, theirs: dict[str, Tensor], linears: Mapping[Place, LinearSpec], settings: Settings
) -> dict[str, Tensor]:
    """The buffers of our packed matrices, under our names; in `theirs` a tensor without values takes the place of what they are made of.

    Raises:
        BadInput: a part of a matrix is missing or of a type that it cannot have.
    """
    made: dict[str, Tensor] = {}
    known = {pair.theirs for pair in family.pairs(spec)}
    for pair, stem, shapes in list(_packed_pairs(family, spec, theirs)):
        linear = linears[_place(pair.ours[0], stem)]
        if pair.theirs in theirs:
            raise BadInput(f"{stem} is there twice: packed, and plain beside it")
        words, zeros, scales = (theirs.pop(f"{stem}.{part}") for part in PARTS)
        index = theirs.pop(f"{stem}.g_idx", None)
        if words.dtype != torch.int32 or zeros.dtype != torch.int32 or not scales.is_floating_point():
            raise BadInput(
                f"{stem}: qweight and qzeros are 32-bit whole numbers, scales are not; got {words.dtype}, {zeros.dtype}, {scales.dtype}"
            )
        of = _groups_of(index, shapes[0].shape[1], linear, len(scales), stem)
        of = None if of is None else of.to(words.device)
        numbers = zero_codes(zeros, linear.bits, second=settings.second)
        rows = [words.t().contiguous().view(torch.uint8), scales.t().to(torch.float16), numbers.t()]
        if not bool(torch.isfinite(rows[1]).all()):
            raise BadInput(f"{stem}.scales: a scale is not finite in 16 bits")
        counts, turned = [len(shape) for shape in shapes], pair.layout is TURNED
        split = zip(*(pair.layout.unpack(part.t() if turned else part, counts, pair.heads) for part in rows), strict=True)
        for name, (code, scale, zero) in zip(pair.ours, split, strict=True):
            base = name.removesuffix("weight") + "base."
            made |= {base + "codes": code.reshape(-1).clone(), base + "scales": scale.contiguous(), base + "zeros": pack(zero, linear.bits)}
            if of is not None:
                made[base + "of"] = of
        theirs[pair.theirs] = pair.layout.pack(shapes, pair.heads)
        bias = f"{stem}.bias"
        if bias in theirs and bias not in known and not bool(theirs[bias].any()):
            del theirs[bias]  # some writers give every matrix one, of zeros
    return made


def zero_codes(words: Int32[Tensor, "groups words"], bits: int, *, second: bool) -> UInt8[Tensor, "groups out"]:
    """The codes of 0. The first version stores them less one, taken off whole words (of 3 bits, off each number): so it is put back."""
    if not second and 32 % bits == 0:
        one = sum(1 << at for at in range(0, 32, bits))
        words = words + torch.tensor(one - (1 << 32) if one >> 31 else one, dtype=torch.int32, device=words.device)
    codes = unpack(words.contiguous().view(torch.uint8).flatten(), bits, words.numel() * 32 // bits).view(len(words), -1)
    return codes if second or 32 % bits == 0 else (codes + 1) % 2**bits


def _packed_pairs(family: Family, spec: ModelSpec, names: Mapping[str, Any]) -> Iterator[tuple[Pair, str, list[Tensor]]]:
    """Which of a family's tensors are packed in a checkpoint, what their names begin with, and tensors of the shapes that ours have."""
    if not any(name.endswith(".qweight") for name in names):
        return
    if not isinstance(spec.stack, StackSpec) or spec.decoder is not None or spec.stack.shared:
        raise BadInput("the GPTQ format is read for one stack of transformer layers that have weights of their own")
    shapes = shapes_of(spec)
    for pair in family.pairs(spec, shapes):
        stem = pair.theirs.removesuffix(".weight")
        for name in dict.fromkeys((stem, stem.removeprefix(family.prefix))):
            if stem != pair.theirs and f"{name}.qweight" in names:
                yield pair, name, [shapes[ours] for ours in pair.ours]
                break


def _place(name: str, stem: str) -> Place:
    found = _NAME.fullmatch(name)
    if found is None:
        raise BadInput(f"{stem} is packed; layerwise reads packed matrices of layers, and plain embeddings and heads")
    return int(found[1]), found[2]


def _groups_of(index: Tensor | None, inner: int, linear: LinearSpec, groups: int, stem: str) -> Tensor | None:
    """The group of every input where it is kept; None where groups are runs of neighbours."""
    neighbours = torch.arange(inner) // (linear.group or inner)
    if index is None:
        return neighbours.to(torch.int32) if linear.indexed else None
    if tuple(index.shape) != (inner,) or index.is_floating_point() or not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise BadInput(f"{stem}.g_idx holds a group, 0 to {groups - 1}, for each of {inner} inputs")
    if linear.indexed:
        return index.to(torch.int32)
    # Writers that make no use of it leave zeros.
    if bool(index.any()) and not torch.equal(index.long().cpu(), neighbours):
        raise BadInput(f"{stem}.g_idx has groups that are not runs of neighbours, though the config says desc_act: false")
    return None
