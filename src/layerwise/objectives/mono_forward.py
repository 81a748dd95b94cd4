"""Every layer trained by its own read-out only: no gradient passes from layer to layer, and none is kept for later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.analyze.findings import Findings, Table
from layerwise.evaluate.batches import batches, inference
from layerwise.objectives.auxiliary import AuxiliaryHeads, Read
from layerwise.objectives.hinge import cross_entropy, right
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective
from layerwise.stack.context import Call, Context


class MonoForward(Objective):
    """Layer i minimizes CE(softmax(M_i a_i), y) over its own weights and M_i, on a_{i-1} as it comes.

    A layer's loss is differentiated as soon as the layer has run and its activations are dropped, so memory is that of one layer
    whatever the depth. M_L is the model's own head; the other M_i belong to the objective. What lies before the first layer (an
    embedding) is trained by the first layer's loss.

    Source: Gong, Li and Abdulla 2025, "Mono-Forward", section 3 (arXiv 2501.09238). Its public independent implementation trains layer
    after layer (`greedy`).

    Args:
        schedule: `joint`: every batch trains all layers; `greedy`: the stage is cut into as many equal parts as there are layers, and in
            each only one layer is trained, on what the finished ones below it make (in evaluation mode).
        read: whether M_i acts on all of a layer's output or on its mean over positions, which is another method for maps.
    """

    one_process = True

    def __init__(self, data: Any = None, *, schedule: Literal["joint", "greedy"] = "joint", read: Read = "flat") -> None:
        super().__init__()
        self.schedule, self.read = schedule, read
        self.current: int | None = None
        self.divisor: float | None = None
        self.readouts: AuxiliaryHeads | None = None

    def attach(self, model: Any, batch: Mapping[str, Any]) -> None:
        if model.stack.depth > 1:
            self.readouts = AuxiliaryHeads(model, batch, range(model.stack.depth - 1), read=self.read, bias=False)

    def before_step(self, step: int, total: int, divisor: float | None) -> None:
        self.divisor = divisor
        depth = 1 if self.readouts is None else len(self.readouts.layers) + 1
        self.current = min(step * depth // total, depth - 1) if self.schedule == "greedy" else None

    def forward(self, model: Any, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        labels, last = batch["labels"], model.stack.depth - 1
        learning = torch.is_grad_enabled() and self.training
        losses: list[Tensor] = []
        goodness: list[Tensor] = []

        def learn(scores: Tensor, layer: int) -> None:
            loss = cross_entropy(scores, labels)
            if learning and self.current in (None, layer):
                (loss / (self.divisor or len(labels))).backward()
            losses.append(loss.detach())
            goodness.append(scores.detach())

        def local(i: int, layer: nn.Module, x: Tensor, ctx: Context, call: Call) -> Tensor:
            if learning and self.current is not None and i != self.current:
                return self._waiting(i, layer, x, ctx, call)
            # The first layer's input keeps its graph, so that an embedding below it learns from the same loss.
            made = call(x.detach() if i else x, ctx)
            if i == last:
                return made
            assert self.readouts is not None
            learn(self.readouts(i, made), i)
            return made.detach()

        out = model(batch, around=(local, *context.pop("around", ())), **context)
        if self.current in (None, last) or not learning:
            learn(out.logits, last)
        total = torch.stack(losses).sum() if self.current is None else losses[-1]
        metrics = {"accuracy": right(goodness[-1], labels), "goodness_accuracy": right(torch.stack(goodness).sum(dim=0), labels)}
        return Loss(total, torch.tensor(len(labels), device=labels.device), metrics, applied=learning)

    def _waiting(self, i: int, layer: nn.Module, x: Tensor, ctx: Context, call: Call) -> Tensor:
        """A layer whose turn is over (it runs, in evaluation mode) or not yet come (it is passed over: nothing above learns now)."""
        assert self.current is not None
        if i > self.current:
            return x.detach()
        with inference(layer):
            return call(x, ctx)

    def finish(self, model: Any, data: Any) -> Findings:
        """Accuracy by each layer's read-out and by the sum of all, on the validation split."""
        self.current = None
        depth = model.stack.depth
        hits = torch.zeros(depth + 1)
        count = 0
        with inference(model):
            for rows in batches(data.validation, 256, None, model.device):
                scores = self._scores(model, rows)
                hits += torch.stack([right(s, rows["labels"]) for s in (*scores, torch.stack(scores).sum(dim=0))]).cpu()
                count += len(rows["labels"])
        shares = (hits / max(count, 1)).tolist()
        table = Table("Validation accuracy by a layer's own read-out", ["layer", "accuracy"], [[i, v] for i, v in enumerate(shares[:-1])])
        return Findings({"goodness_sum_accuracy": shares[-1], "last_readout_accuracy": shares[-2]}, [table])

    def _scores(self, model: Any, batch: Mapping[str, Any]) -> list[Tensor]:
        if self.readouts is None:
            return [model(batch).logits]
        with self.readouts.watching(model) as seen:
            last = model(batch).logits
        return [*(self.readouts(i, seen[i]) for i in self.readouts.layers), last]
