"""How many tokens went through how many layers: the cost that papers on growing and skipping layers count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.analyze.findings import Findings
from layerwise.stack.context import Call, Context
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class LayerCost(Policy):
    """Counts calls of layers as they happen. Name it after the policies that skip or repeat layers, so that it stands inside of them.

    Logs and leaves `layer_tokens`, tokens times layers that ran forward, and `layer_cost`, the same plus as much again for every
    call of a layer that is trained: one unit for a layer's forward, one for its backward (of each token). A layer at rest costs
    no backward here, though the gradient of what lies below it may pass through; the `ledger` policy counts operations.

    Source: the cost model of "On the Effectiveness of Incremental Training of Large Language Models" (arXiv 2411.18700), section 3.
    """

    def __init__(self) -> None:
        self.forward = self.backward = 0
        self.around = (self._count,)

    def _count(self, i: int, layer: Any, x: Tensor, ctx: Context, call: Call) -> Tensor:
        if layer.training:
            tokens = x.shape[0] * (x.shape[1] if x.dim() == 3 else 1)
            self.forward += tokens
            self.backward += tokens * any(p.requires_grad for p in layer.parameters())
        return call(x, ctx)

    def after_step(self, run: Run) -> None:
        if run.logs:
            run.log(self._values())

    def _values(self) -> dict[str, float]:
        return {"layer_tokens": self.forward, "layer_cost": self.forward + self.backward}

    def state(self) -> dict[str, Tensor]:
        return {"counts": torch.tensor([self.forward, self.backward])}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.forward, self.backward = state["counts"].tolist()

    def findings(self) -> Findings:
        return Findings(self._values())
