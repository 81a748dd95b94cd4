"""Weights that a graph hypernetwork predicts, as the start of training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.embed.spec import GraphSpec
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches
from layerwise.models.ghn import predict, with_noise
from layerwise.models.graph import trace
from layerwise.models.load import described, load_any
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec


def ghn_initialize(
    model: Model, data: Any = None, *, ghn: str, classifier: bool = True, noise: float = 1e-5, samples: int = 512, seed: int | None = None
) -> Model:
    """The model with every parameter predicted from its graph, to be trained with a smaller learning rate than random weights take.

    Batch norms get the statistics of `samples` training images, if there is data: predicted weights come without any.

    Args:
        ghn: folder of a trained hypernetwork; in a job also `stage:NAME`.
        classifier: predict the layer that makes the scores too; otherwise it keeps its weights (transfer to other classes).
        noise: against channels that tiling made equal, see `layerwise.models.ghn.with_noise`.

    Raises:
        BadInput: `ghn` is no graph hypernetwork, or the model's graph cannot be traced.

    Source: Knyazev, Hwang and Lacoste-Julien 2023, "Can We Scale Transformers to Predict Parameters of Diverse ImageNet Models?",
    sections 3 and 5 (arXiv 2303.04143).
    """
    network: Any = load_any(ghn, str(model.device))
    _check(network.spec, ghn)
    new = copy.deepcopy(model)
    with torch.no_grad():
        (found,) = predict(network, [trace(new)], classifier=classifier)
        own = dict(new.named_parameters())
        for name, value in with_noise(found, noise, torch.Generator().manual_seed(seed or 0)).items():
            own[name].copy_(value)
    norms = [module for module in new.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if data is not None and norms:
        _count(new, norms, data, samples)
    return new.eval()


def _count(model: Model, norms: list[Any], data: Any, samples: int) -> None:
    """Running statistics of the batch norms over some training images: the mean over batches."""
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for rows in batches(data.train, 128, -(-samples // 128), model.device):
            model(rows)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


def preview_ghn(spec: ModelSpec, *, ghn: str, **_: Any) -> ModelSpec:
    """What `ghn_initialize` makes of a model's description: the same."""
    if not ghn.startswith("stage:"):
        _check(described(Path(ghn)), ghn)
    return spec


def _check(spec: Any, ghn: str) -> None:
    if not isinstance(spec.embedding, GraphSpec) or spec.head is None or spec.head.kind != "parameters":
        raise BadInput(f"{ghn} holds no graph hypernetwork: its embedding is of kind graph and its head of kind parameters")
