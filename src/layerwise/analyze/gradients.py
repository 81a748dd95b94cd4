"""Gradient norms by depth."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from layerwise.analyze.findings import Findings, Table
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, split_of
from layerwise.objectives import OBJECTIVES
from layerwise.stack.depth import depth_of
from layerwise.stack.sharding import whole
from layerwise.table import lookup


def depth_gradient_norms(model: nn.Module) -> dict[int, float]:
    """Norm of all gradients of each depth (-1: before the layers; their number: after them); needs a backward pass done."""
    depths = depth_of(model)
    squares: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            square = parameter.grad.detach().float().square().sum()
            squares[depths[name]] = squares.get(depths[name], torch.zeros_like(square)) + square
    return {i: whole(s).sqrt().item() for i, s in sorted(squares.items())}


def gradient_norms(
    model: Any, data: Any, *, split: str = "train", objective: str = "causal-lm", batch: int = 16, batches_at_most: int = 4
) -> Findings:
    """Gradient norm of every layer, averaged over a few batches; the model's gradients are left empty.

    Metrics: `grad_norm_variation`, the coefficient of variation over the layers (0: all layers get gradients alike).
    """
    sums: dict[int, float] = {}
    seen = 0
    for loss in batch_losses(model, data, split=split, objective=objective, batch=batch, batches_at_most=batches_at_most):
        model.zero_grad(set_to_none=True)
        loss.backward()
        for i, norm in depth_gradient_norms(model).items():
            sums[i] = sums.get(i, 0.0) + norm
        seen += 1
    model.zero_grad(set_to_none=True)
    norms = {i: s / seen for i, s in sums.items()}
    table = Table("Gradient norm by layer", ["layer", "gradient norm"], [[i, n] for i, n in norms.items()])
    return Findings({"grad_norm_variation": variation([n for i, n in norms.items() if 0 <= i < model.stack.depth])}, [table])


def gradient_variance(
    model: Any, data: Any, *, split: str = "train", objective: str = "causal-lm", batch: int = 16, batches_at_most: int = 8
) -> Findings:
    """How much gradients differ from batch to batch, by depth: mean over batches of |g_b - mean g|^2; the model's gradients are left empty.

    Metric: `head_variance_share`, of what lies after the layers in the whole network's.
    Source: Glentis et al. 2025, "A Minimalist Optimizer Design for LLM Pretraining" (arXiv 2506.16659): the layer with the largest
    variance is the one that momentum pays for.
    """
    depths = depth_of(model)
    means: dict[str, torch.Tensor] = {}
    spread: dict[int, float] = {}
    seen = 0
    for loss in batch_losses(model, data, split=split, objective=objective, batch=batch, batches_at_most=batches_at_most):
        model.zero_grad(set_to_none=True)
        loss.backward()
        seen += 1
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                continue
            # Welford 1962: the running mean moves by its share of the deviation, and the sum of squares gains the rest.
            mean = means.setdefault(name, torch.zeros_like(parameter))
            deviation = parameter.grad - mean
            mean += deviation / seen
            spread[depths[name]] = spread.get(depths[name], 0.0) + (deviation * (parameter.grad - mean)).sum().item()
    model.zero_grad(set_to_none=True)
    found = {i: s / seen for i, s in sorted(spread.items())}
    table = Table("Variance of the gradient by layer", ["layer", "variance"], [[i, v] for i, v in found.items()])
    return Findings({"head_variance_share": found.get(model.stack.depth, 0.0) / max(sum(found.values()), 1e-300)}, [table])


def mean_gradients(
    model: nn.Module,
    data: Any,
    names: Collection[str],
    *,
    samples: int,
    split: str,
    batch: int,
    objective: str,
    absolute: bool = False,
) -> dict[str, torch.Tensor]:
    """Gradient of the loss on a split's first `samples` rows (spread evenly), averaged over batches; parameters' own `grad` stays as it is.

    Args:
        names: of the parameters. Those that the loss does not depend on get zeros.
        absolute: average the gradients' absolute values.

    Raises:
        BadInput: there are none.
    """
    if not names:
        raise BadInput("scores by gradients need parameters that are trained; all of this model's are frozen or packed")
    wanted = {n: p for n, p in model.named_parameters() if n in names}
    sums = {n: torch.zeros_like(p) for n, p in wanted.items()}
    seen = 0
    for loss in batch_losses(model, data, split=split, objective=objective, batch=batch, batches_at_most=-(-samples // batch)):
        for name, gradient in zip(wanted, torch.autograd.grad(loss, list(wanted.values()), allow_unused=True), strict=True):
            if gradient is not None:
                sums[name] += gradient.abs() if absolute else gradient
        seen += 1
    return {n: s / max(seen, 1) for n, s in sums.items()}


def batch_losses(model: Any, data: Any, *, split: str, objective: str, batch: int, batches_at_most: int) -> Iterator[torch.Tensor]:
    """The mean loss of each batch, to be differentiated, with the model in evaluation mode until they are through."""
    loss_of = lookup(OBJECTIVES, objective, "objective")(data).to(model.device)
    generator = torch.Generator(device=model.device).manual_seed(0)
    training = model.training
    model.eval()
    try:
        for rows in batches(split_of(data, split), batch, batches_at_most, model.device):
            yield loss_of(model, rows, generator).mean
    finally:
        model.train(training)


def matrix_gradients(model: nn.Module, matrix: str = "ffn.branch.down.weight") -> dict[int, float]:
    """Mean absolute gradient of one matrix of every layer that has it (the feed-forward's second one); needs a backward pass done.

    Source: Shleifer et al. 2021, "NormFormer", section 4: in Pre-LN networks early layers' are larger than late ones'.
    """
    depths = depth_of(model)
    found = {
        depths[n]: p.grad.detach().abs().mean().item() for n, p in model.named_parameters() if n.endswith(matrix) and p.grad is not None
    }
    return dict(sorted(found.items()))


def variation(values: list[float]) -> float:
    """Coefficient of variation: standard deviation over mean."""
    mean = sum(values) / max(len(values), 1)
    return (sum((v - mean) ** 2 for v in values) / max(len(values), 1)) ** 0.5 / mean if mean else 0.0
