"""Networks without weights of their own, run with weights that come from elsewhere."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.models.graph import Graph, scores, trace
from layerwise.models.model import make_model


@dataclass(frozen=True)
class Target:
    """A network on the meta device, which owns no weights, and its graph.

    Batch norms use the statistics of the batch, in training and after it: predicted weights come without running statistics.
    """

    network: nn.Module
    graph: Graph

    @staticmethod
    def of(network: nn.Module, *example: Any) -> Target:
        """Of a network (a copy of it without values), with an example of its inputs as for `trace`."""
        network = copy.deepcopy(network).to("meta")
        graph = trace(network, *example)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean = module.running_var = module.num_batches_tracked = None
        return Target(network.requires_grad_(False), graph)

    def __call__(self, parameters: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Scores of a batch of images with these weights; gradients flow into them."""
        return scores(self.network, parameters, batch if hasattr(self.network, "spec") else batch["pixel_values"])


@functools.lru_cache(maxsize=2000)
def target_of(spec: Any) -> Target:
    """Of a model's description. It is traced once in a process: all arms of a comparison meet the same architectures."""
    with torch.device("meta"):
        network = make_model(spec)
    return Target.of(network)
