"""Single weights set to zero by their size, all kernels of the stack together, and tickets made of what is left."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.models.model import Model, build
from layerwise.models.spec import ModelSpec


def kernels(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of dense and convolutional maps (2 or 4 dimensions) by name; embeddings are none."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {n: p for n, p in model.named_parameters() if p.dim() in (2, 4) and id(p) not in tables}


def prune_magnitude(model: Model, *, ratio: float = 10.0) -> Model:
    """The model with only the floor(n / ratio) largest of its n kernel weights, over all kernels together; the others are zero.

    Args:
        ratio: how many times fewer weights remain.
    """
    preview_prune(model.spec, ratio=ratio)
    new = copy.deepcopy(model)
    found = kernels(new)
    sizes = torch.cat([p.detach().abs().flatten() for p in found.values()])
    kept = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    kept[sizes.topk(int(len(sizes) / ratio)).indices] = True
    with torch.no_grad():
        for p, mask in zip(found.values(), kept.split([p.numel() for p in found.values()]), strict=True):
            p.mul_(mask.view_as(p))
    return new


def preview_prune(spec: ModelSpec, *, ratio: float = 10.0, **_: Any) -> ModelSpec:
    """What `prune_magnitude` makes of a description: the same, as zeros are weights too."""
    if ratio < 1:
        raise BadInput(f"ratio says how many times fewer weights remain, so it is at least 1; it is {ratio}")
    return spec


def rewind(model: Model, *, seed: int | None = None) -> Model:
    """The weights the model began with, where it is not zero now: the lottery ticket of a pruned model.

    Source: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis", section 1.

    Args:
        seed: that the model was built with (None: the run's, which a job builds its models with).
    """
    fresh = build(model.spec, seed or 0, model.device)
    found = kernels(model)
    with torch.no_grad():
        for name, p in kernels(fresh).items():
            p.mul_(found[name] != 0)
    return fresh


def preview_rewind(spec: ModelSpec, **_: Any) -> ModelSpec:
    """What `rewind` makes of a description."""
    return spec


def densities(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Kernel -> (weights that are not zero, all weights)."""
    return {n: (int(torch.count_nonzero(p)), p.numel()) for n, p in kernels(model).items()}


def zero_masks(model: nn.Module) -> dict[str, Tensor]:
    """Kernel -> True where a weight is not zero, for kernels that have zeros."""
    return {n: p.detach() != 0 for n, p in kernels(model).items() if bool((p == 0).any())}
