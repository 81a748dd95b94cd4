"""Training a model's filters to solve the task from one layer alone each, on the frozen model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.analyze.findings import Findings
from layerwise.errors import BadInput
from layerwise.evaluate.batches import inference
from layerwise.models.heads import LMHead, pool
from layerwise.models.spec import ModelSpec
from layerwise.objectives.cross_entropy import linear_cross_entropy
from layerwise.objectives.language import next_tokens
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective


class FilterTraining(Objective):
    """L = (1/K) sum_k CE(head_k(filter_k(H_k)), y): stage I of task-aware distillation, for teacher and student alike.

    The model (its own head included) is frozen and runs in evaluation mode, without gradients; filters and private heads are trained, and
    the heads dropped when the stage ends. What it leaves is the model with its filters, which stage II (`distillation`) finds on the
    student and on `teacher: stage:NAME`. Classes: pool as the model's head does, dropout, linear, GELU, dropout, linear. Next tokens: a
    vocabulary matrix.

    Source: Liang et al. 2023, "Less is More: Task-aware Layer-wise Distillation" (arXiv 2210.01351), section 3.1.

    Args:
        task: what the labels are. dropout: in the private heads.

    Raises:
        BadInput: the model has no filters (edit: add-filters), or a head for something else than the task.
    """

    def __init__(self, data: Any = None, *, task: Literal["classification", "causal-lm"] = "classification", dropout: float = 0.0) -> None:
        super().__init__()
        self.task, self.dropout = task, dropout
        self.heads: nn.ModuleDict | None = None
        self._frozen: list[nn.Parameter] = []

    @staticmethod
    def check(spec: ModelSpec) -> None:
        """Raises BadInput: the model has no filters."""
        if spec.filters is None:
            raise BadInput("the objective filters trains a model's filters, and this one has none: put edit: add-filters before it")

    def attach(self, model: Any, batch: Mapping[str, Any]) -> None:
        self.check(model.spec)
        words = isinstance(model.head, LMHead)
        if words != (self.task == "causal-lm"):
            raise BadInput(f"task {self.task} needs a head of kind {'lm' if self.task == 'causal-lm' else 'classifier'}")
        size = model.filters.spec.size
        heads: dict[str, nn.Module] = {}
        for i in model.filters.layers:
            if words:
                heads[str(i)] = nn.Linear(size, len(model.token_matrix), bias=False)
            else:
                drop, classes = nn.Dropout(self.dropout), model.head.out.out_features
                heads[str(i)] = nn.Sequential(drop, nn.Linear(size, size), nn.GELU(), nn.Dropout(self.dropout), nn.Linear(size, classes))
            generator = torch.Generator().manual_seed(i)  # a head does not depend on which others there are
            for linear in heads[str(i)].modules():
                if isinstance(linear, nn.Linear):
                    for parameter in linear.parameters():
                        nn.init.uniform_(parameter, -(linear.in_features**-0.5), linear.in_features**-0.5, generator=generator)
        self.heads = nn.ModuleDict(heads).to(model.device)
        self._frozen = [p for n, p in model.named_parameters() if not n.startswith("filters.") and p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def forward(self, model: Any, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        if self.heads is None:
            self.attach(model, batch)
        assert self.heads is not None
        with inference(model):
            out = model(batch, hiddens=True, **context)
        parts = [self._loss(model, batch, i, model.filters(i, out.hiddens[i]), out) for i in model.filters.layers]
        count = parts[0].count
        total: Tensor = torch.stack([part.total for part in parts]).mean()
        return Loss(total, count, {f"loss_{i}": part.total.detach() for i, part in zip(model.filters.layers, parts, strict=True)})

    def _loss(self, model: Any, batch: Mapping[str, Any], layer: int, filtered: Tensor, out: Any) -> Loss:
        assert self.heads is not None
        head: Any = self.heads[str(layer)]
        if self.task == "causal-lm":
            labels = next_tokens(batch)
            kept = labels.flatten() != -100
            total = linear_cross_entropy(filtered[:, :-1].flatten(0, 1)[kept], head.weight, labels.flatten()[kept])
            return Loss(total, kept.sum())
        prefix = getattr(model.spec.embedding, "prefix", 0)
        scores = head(pool(filtered, model.spec.head.pool, out.mask, prefix, out.ends))
        return Loss(F.cross_entropy(scores, batch["labels"], reduction="sum"), torch.tensor(len(scores), device=scores.device))

    def finish(self, model: Any, data: Any) -> Findings | None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        return None
