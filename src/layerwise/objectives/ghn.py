"""Training a graph hypernetwork: the networks it fills in are scored, and it alone learns."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F

from layerwise.errors import BadInput
from layerwise.models.architectures import distinct
from layerwise.models.ghn import predict
from layerwise.models.targets import target_of
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective


class GraphHyperNetwork(Objective):
    """Mean cross-entropy of several networks with the weights that the model predicts for them, on one batch of labelled images.

    loss = (1/m) sum_a [CE(f_a(x; theta_a), y) + penalty sum_tensors ||theta_a||_F], the m architectures drawn anew in every step from
    a fixed pool. Metric: `accuracy`, of those networks.

    Source: Knyazev, Hwang and Lacoste-Julien 2023 (GHN-3), section 3.2: eight architectures, smoothing 0.1, penalty 3e-5.

    Args:
        nets: architectures in a step, m. pool: how many there are. pool_seed: what the pool is drawn with.
        smoothing: label smoothing. penalty: on the norms of predicted tensors.
    """

    def __init__(
        self, data: Any = None, *, nets: int = 8, pool: int = 500, pool_seed: int = 0, smoothing: float = 0.1, penalty: float = 3e-5
    ) -> None:
        super().__init__()
        if not 1 <= nets <= pool:
            raise BadInput(f"nets is between 1 and pool ({pool}); it is {nets}")
        self.nets, self.pool, self.pool_seed, self.smoothing, self.penalty = nets, pool, pool_seed, smoothing, penalty
        self.specs: list[Any] = []

    def forward(self, model: Any, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        self.specs = self.specs or training_pool(model, self.pool, self.pool_seed)
        # By the step's seed: all micro-batches of a step meet the same architectures.
        drawn = random.Random(0 if generator is None else generator.initial_seed()).sample(range(self.pool), self.nets)
        targets = [target_of(self.specs[i]) for i in drawn]
        labels, count = batch["labels"], len(batch["labels"])
        loss, right = labels.new_zeros((), dtype=torch.float32), labels.new_zeros((), dtype=torch.float32)
        for target, parameters in zip(targets, predict(model, [t.graph for t in targets]), strict=True):
            scores = target(parameters, batch)
            loss = loss + F.cross_entropy(scores, labels, label_smoothing=self.smoothing)
            loss = loss + self.penalty * sum(p.norm() for p in parameters.values())
            right += (scores.argmax(dim=1) == labels).sum()
        return Loss(loss * (count / self.nets), torch.tensor(count, device=labels.device), {"accuracy": right / self.nets})


def training_pool(model: Any, pool: int, seed: int) -> list[Any]:
    """The architectures that a hypernetwork is trained on, for the images and classes of its description."""
    embedding, head = model.spec.embedding, model.spec.head
    options = {"channels": embedding.channels, "size": embedding.size, "classes": head.classes}
    return distinct(pool, torch.Generator().manual_seed(seed), **options)
