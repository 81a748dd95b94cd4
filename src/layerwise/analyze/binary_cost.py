"""Operations and bytes of a network of which parts have one bit: what multiplies bits is counted apart from what multiplies numbers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.analyze.cost import Operations
from layerwise.analyze.findings import Findings, Table
from layerwise.analyze.ledger import parameter_bytes
from layerwise.embed.one_bit import PackedTable
from layerwise.evaluate.batches import batches, split_of
from layerwise.models.model import Model
from layerwise.nn.binary_attention import BinaryAttention
from layerwise.nn.linears.binary import Binary, PackedBinary

WORD = 64
"""Bits that one machine operation multiplies and sums: XNOR and a count of ones."""


def operations(model: Model, data: Any, *, split: str = "validation", batch: int = 16) -> Findings:
    """What one forward costs a row of data, a multiply-add counted as two, and how many bytes the network takes.

    Metrics:
        float_operations: products of numbers. bit_operations: products of one-bit numbers with one-bit numbers.
        operations: the first plus the second / 64, the convention of binary networks.
        operations_ratio: both in full / `operations`: how many times fewer than if every product was of numbers.
        bytes: parameters and buffers as they are; a binary matrix takes one bit a weight only after `pack-binary`.
        bytes_ratio: what the same would take with 4 bytes a number / `bytes`.

    Element-wise work (norms, activations, shifts) is not counted, nor is making the signs. The full-precision estimates of
    BiPFT's attention are numbers and count as such. Operations follow from shapes: simulated bits count as if they were run.

    Source of the convention: Liu et al. 2018, "Bi-Real Net", section 4.2, as Bai et al. 2021, "BinaryBERT", and Xing et al. 2024,
    "BiPFT" (arXiv 2312.08937), use it.
    """
    rows = next(batches(split_of(data, split), batch, 1, model.device))
    count = len(next(iter(rows.values())))
    bits = 0.0
    floats_inside = 0.0

    def linear(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal bits
        bits += 2 * args[0].numel() * module.out_features

    def attention(module: BinaryAttention, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal bits, floats_inside
        b, s, width = args[0].shape
        bits += 2 * 2 * b * s * s * width
        if module.estimators is not None:  # its estimate of the values' residuals is added to Vb before the product with Ab
            floats_inside += 2 * b * module.spec.heads * s * s

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, Binary | PackedBinary):
                stack.callback(module.register_forward_hook(linear).remove)
            elif isinstance(module, BinaryAttention):
                stack.callback(module.register_forward_hook(attention).remove)
        stack.enter_context(torch.no_grad())
        was = model.training
        stack.callback(model.train, was)
        counter = stack.enter_context(Operations())
        out = model.eval()(rows)
        if model.head is not None:
            _ = out.logits
    floats = counter.total - bits + floats_inside
    weighted = floats + bits / WORD
    stored, plain = parameter_bytes(model), _plain_bytes(model)
    metrics = {
        "float_operations": floats / count,
        "bit_operations": bits / count,
        "operations": weighted / count,
        "operations_ratio": (floats + bits) / weighted,
        "bytes": float(stored),
        "bytes_ratio": plain / stored,
    }
    table = Table("What one bit saves", ["", "as it is", "in numbers of 4 bytes"], [
        ["operations a row", metrics["operations"], (floats + bits) / count],
        ["bytes", stored, plain],
    ])  # fmt: skip
    return Findings(metrics, [table])


def _plain_bytes(model: nn.Module) -> int:
    """Bytes of the network's numbers at 4 bytes each, packed ones unpacked and scales of bits left out."""
    total = sum(4 * t.numel() for t in model.parameters())
    for module in model.modules():
        if isinstance(module, PackedBinary):
            total += 4 * module.in_features * module.out_features
        elif isinstance(module, PackedTable):
            total += 4 * len(module.bits) * module.size
    return total
