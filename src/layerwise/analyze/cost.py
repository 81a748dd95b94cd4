"""What each layer costs: parameters, bytes, and floating-point operations counted by PyTorch's own counter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from layerwise.stack.depth import view


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of one fused attention: both products, all pairs of positions, a multiply-add counted as two.

    PyTorch's counter knows its GPU kernels but not the CPU's. Masked pairs count, as they do there.
    """
    batch, heads, queries, size = q
    return 2 * batch * heads * queries * k[-2] * (size + v[-1])


def attention_backward_flops(gradient: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of the backward pass of one fused attention: scores again, and the gradients of q, k, v and the probabilities."""
    batch, heads, queries, size = q
    return 2 * batch * heads * queries * k[-2] * (3 * size + 2 * v[-1])


def addmm_flops(bias: torch.Size, a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of a matrix product added to something in place, which PyTorch's counter knows in its other form only."""
    return 2 * a[0] * a[1] * b[1]


FORMULAS = {
    torch.ops.aten.addmm_: addmm_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
"""What PyTorch's counter lacks, for `FlopCounterMode(custom_mapping=...)`."""


class Operations(TorchDispatchMode):
    """A context that counts the operations of everything in it, forward and backward, in `total`.

    PyTorch's `FlopCounterMode` takes composite kernels (RMSNorm) apart, which changes results in the last bit. This one only
    looks on, with the same formulas, so that a measured step of training is the step that would have been anyway.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in FORMULAS:
            self.total += FORMULAS[packet](*(a.shape for a in args if isinstance(a, torch.Tensor)))
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


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
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        out = model(batch) if hasattr(model, "spec") else model(**batch)
        if getattr(model, "head", None) is not None:
            _ = out.logits
    counts = counter.get_flop_counts()
    whole = sum(counts.get("Global", {}).values())
    table[-1].flops = sum(counts.get(f"{prefix}.embedding", {}).values())  # of ours; a foreign network's count as after its layers
    for layer in dict.fromkeys(seen.layers):
        # A layer that stands in several places is counted under its first name: each of its visits cost the same.
        places = [i for i, other in enumerate(seen.layers) if other is layer]
        for i in places:
            table[i].flops = sum(counts.get(f"{prefix}.{seen.names[places[0]]}", {}).values()) // len(places)
    table[seen.depth].flops = whole - sum(c.flops for c in table.values())
    return table
