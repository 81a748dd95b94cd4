"""What each layer costs: parameters, bytes, and floating-point operations counted by PyTorch's own counter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerwise.stack.depth import view


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of one fused attention: both products, all pairs of positions, a multiply-add counted as two.

    PyTorch's counter knows its GPU kernels but not the CPU's. Masked pairs count, as they do there.
    """
    batch, heads, queries, size = q
    return 2 * batch * heads * queries * k[-2] * (size + v[-1])


ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


@dataclass
class Cost:
    """Cost of one depth.

    Attributes:
        params: parameters (a shared one counts where it is met first). bytes: of them.
        flops: floating-point operations of one forward, a multiply-add counted as two.
    """

    params: int = 0
    bytes: int = 0
    flops: int = 0


def size(model: nn.Module) -> dict[str, int]:
    """Layers, parameters and bytes of a whole network."""
    parameters = list(model.parameters())
    seen = view(model)
    return {
        "layers": seen.depth,
        "params": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def costs(model: nn.Module, batch: dict[str, Any]) -> dict[int, Cost]:
    """Cost of every depth (-1: before the layers, their number: after them) of one forward on `batch`, logits included.

    Divide `flops` by the number of tokens in `batch` for a cost per token.
    """
    seen = view(model)
    depths = seen.depth_of()
    table = {i: Cost() for i in range(-1, seen.depth + 1)}
    for name, parameter in model.named_parameters():
        table[depths[name]].params += parameter.numel()
        table[depths[name]].bytes += parameter.numel() * parameter.element_size()
    prefix = type(model).__name__
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        out = model(batch) if hasattr(model, "spec") else model(**batch)
        if getattr(model, "head", None) is not None:
            _ = out.logits
    counts = counter.get_flop_counts()
    whole = sum(counts.get("Global", {}).values())
    for i, name in enumerate(seen.names):
        table[i].flops = sum(counts.get(f"{prefix}.{name}", {}).values())
    table[seen.depth].flops = whole - sum(c.flops for c in table.values())
    return table
