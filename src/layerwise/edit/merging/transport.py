"""Two networks averaged after the neurons of one were matched with those of the other by optimal transport."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import ot
import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.heads import ClassifierHead
from layerwise.models.load import load_any
from layerwise.models.model import Model
from layerwise.models.plain_spec import PlainLayerSpec, PlainStackSpec
from layerwise.models.spec import ModelSpec

By = Literal["activations", "weights"]
Solver = Literal["exact", "sinkhorn"]


def ot_fuse(
    model: Model,
    data: Any = None,
    *,
    other: str | Model,
    by: By = "activations",
    match: Literal["transport", "none"] = "transport",
    solver: Solver = "exact",
    reg: float = 0.01,
    weight: float = 0.5,
    samples: int = 200,
    incoming: Literal["columns", "rows"] = "columns",
    split: str = "train",
) -> Model:
    """The average of this model and another one of the same depth, whose neurons are put into this one's order layer by layer.

    For layer l, with T the previous layer's map (n_other, n_this), columns summing to 1: the other's incoming weights become
    W T; neurons are compared; the transport plan between them, uniform masses, is the next T; the other's rows become T^T W T. At the end
    (1 - weight) theirs + weight ours. Biases and batch norm's gains, shifts and running statistics move along, which the paper leaves out.

    Source: Singh and Jaggi 2020, "Model Fusion via Optimal Transport", algorithm 1 (arXiv 1910.05653).

    Args:
        data: gives `samples` rows where neurons are compared by activations.
        other: a checkpoint's folder (in a job also `stage:NAME`), or a model. Its layers may have other widths.
        by: neurons are near if their values before norm and ReLU are, on the same inputs; or their incoming weights.
        match: `none` averages as they stand, which needs equal widths.
        solver: `exact`, or with entropic regularization `reg` of costs divided by their largest.
        weight: of this model.
        incoming: of other widths, whether the map of incoming weights has columns that sum to 1 (the paper) or rows that do, which keeps the
            size of what a neuron receives.

    Raises:
        BadInput: other depth or kinds of layers, or layers that cannot be matched (residual ones).
    """
    preview_fuse(model.spec, weight=weight, reg=reg)
    theirs = other if isinstance(other, Model) else load_any(other, str(model.device))
    check_alike(model.spec, theirs.spec, match=match)
    seen = [_preactivations(m, data, split, samples) for m in (model, theirs)] if by == "activations" and match == "transport" else None
    fused = copy.deepcopy(model)
    carried: Tensor | None = None
    with torch.no_grad():
        for i, (ours, layer, target) in enumerate(zip(model.stack.layers, theirs.stack.layers, fused.stack.layers, strict=True)):
            aligned = _incoming(layer.weight.weight, carried, incoming)
            if match == "none":
                carried = torch.eye(len(aligned), device=aligned.device, dtype=aligned.dtype)
            else:
                a, b = (s[i] for s in reversed(seen)) if seen else (aligned.flatten(1), ours.weight.weight.flatten(1))
                carried = transport_map(a, b, solver=solver, reg=reg).to(aligned)
            for name, here in ours.state_dict().items():
                there = aligned if name == "weight.weight" else layer.state_dict()[name]
                mixed = torch.lerp(_moved(there, carried), here, weight) if here.is_floating_point() else here
                _set(target, name, mixed)
        mine, given, made = (_readout(m) for m in (model, theirs, fused))
        made.weight.copy_(torch.lerp(_incoming(given.weight, carried, incoming), mine.weight, weight))
        if made.bias is not None:
            made.bias.copy_(torch.lerp(given.bias, mine.bias, weight))
    return fused


def preview_fuse(spec: ModelSpec, *, weight: float = 0.5, reg: float = 0.01, **_: Any) -> ModelSpec:
    """What `ot_fuse` makes of a model's description: the same."""
    if not isinstance(spec.stack, PlainStackSpec) or spec.head is None or spec.head.kind != "classifier":
        raise BadInput("ot-fuse matches the neurons of dense and convolutional layers under a classifier; this model has others")
    if bad := [i for i, layer in enumerate(spec.stack.layers) if layer.kind not in ("dense", "conv")]:
        raise BadInput(f"ot-fuse matches dense and conv layers; layer {bad[0]} is {spec.stack.layers[bad[0]].kind}")
    if not 0 <= weight <= 1 or reg <= 0:
        raise BadInput(f"weight lies in [0, 1] and reg is above 0; got {weight} and {reg}")
    return spec


def transport_map(
    a: Float[Tensor, "n features"], b: Float[Tensor, "m features"], *, solver: Solver = "exact", reg: float = 0.01
) -> Float[Tensor, "n m"]:
    """The plan from neurons `a` to neurons `b`, each column divided by its mass 1/m: of equal numbers a permutation, if exact.

    The cost is the Euclidean distance, not squared; all neurons weigh alike. Solved in float64 by POT.
    """
    plan = transport_plan(torch.cdist(a.detach().double(), b.detach().double()).cpu().numpy(), solver=solver, reg=reg)
    return torch.from_numpy(plan * plan.shape[1]).to(a.device)


def transport_plan(cost: np.ndarray, *, solver: Solver = "exact", reg: float = 0.01) -> np.ndarray:
    """The plan (n, m) of least cost between uniform masses."""
    rows, columns = np.full(cost.shape[0], 1 / cost.shape[0]), np.full(cost.shape[1], 1 / cost.shape[1])
    if solver == "exact":
        return ot.emd(rows, columns, cost, numItermax=1_000_000)
    return ot.sinkhorn(rows, columns, cost / max(cost.max(), 1e-12), reg, method="sinkhorn_log", numItermax=10_000)


def _incoming(weight: Tensor, carried: Tensor | None, how: str) -> Tensor:
    """The other's weights with its inputs in this model's order: along axis 1, at every kernel position alike."""
    if carried is None:
        return weight
    carried = carried if how == "columns" else carried * (carried.shape[0] / carried.shape[1])
    return torch.einsum("oi...,ij->oj...", weight, carried)


def _moved(tensor: Tensor, carried: Tensor) -> Tensor:
    """A tensor whose first axis is the layer's neurons, in this model's order; a single number stays."""
    return torch.einsum("n...,nm->m...", tensor, carried) if tensor.dim() else tensor


def _readout(model: Model) -> nn.Linear:
    """The classifier's linear map: its outputs are classes, which need no matching."""
    assert isinstance(model.head, ClassifierHead)
    return model.head.out


def _set(layer: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    getattr(layer.get_submodule(owner), leaf).copy_(value)


def check_alike(ours: ModelSpec, theirs: ModelSpec, *, match: Literal["transport", "none"]) -> None:
    """Raises BadInput: networks that cannot be fused, in kinds of layers, classes or, where nothing is matched, widths."""
    preview_fuse(ours)
    preview_fuse(theirs)
    here, there = ([layer for layer in m.stack.layers if isinstance(layer, PlainLayerSpec)] for m in (ours, theirs))
    kinds = [[(layer.kind, layer.norm, layer.size, layer.bias) for layer in layers] for layers in (here, there)]
    if kinds[0] != kinds[1]:
        raise BadInput(f"ot-fuse needs the same layers but for their widths; here they are {kinds[0]}, there {kinds[1]}")
    # Classes that the data decides are filled in when a model is made.
    heads = [m.head.classes if m.head is not None else None for m in (ours, theirs)]
    if heads[0] != heads[1] and None not in heads:
        raise BadInput(f"ot-fuse needs the same classes; there are {heads[0]} here and {heads[1]} there")
    for i, (a, b) in enumerate(zip(here, there, strict=True)):
        if match == "none" and a.channels != b.channels:
            raise BadInput(f"layer {i} has {b.channels} neurons there and {a.channels} here: match: none needs equal ones")


def _preactivations(model: Model, data: Any, split: str, samples: int) -> list[Float[Tensor, "neurons values"]]:
    """What every neuron makes before norm and ReLU, over samples and, in maps, positions."""
    if data is None:
        raise BadInput("comparing neurons by their activations needs data: give it, or use by: weights")
    kept: list[list[Tensor]] = [[] for _ in model.stack.layers]
    handles = [
        layer.weight.register_forward_hook(lambda _m, _g, made, i=i: kept[i].append(made)) for i, layer in enumerate(model.stack.layers)
    ]
    try:
        with inference(model):
            for rows in batches(split_of(data, split), min(samples, 256), -(-samples // min(samples, 256)), model.device):
                model(rows)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(_parts(parts), dim=1) for parts in kept]


def _parts(parts: Sequence[Tensor]) -> list[Tensor]:
    return [part.transpose(0, 1).flatten(1) for part in parts]
