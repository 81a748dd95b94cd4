"""The gradient norm of every layer while training goes on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.analyze.findings import Findings, Table
from layerwise.analyze.gradients import depth_gradient_norms, matrix_gradients, variation
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class GradientNorms(Policy):
    """Logs the gradient norm of every depth, `grad_norm/<depth>`, and leaves first and last values as a table.

    Metrics: `grad_norm_variation` over the layers at the last step; `fc2_grad_ratio`, the mean absolute gradient of the
    feed-forward's second matrix in the first layer over that in the last (geometric mean over the logged steps, 1: alike).
    """

    def __init__(self, *, every: int = 10) -> None:
        self.every = every
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._log_ratio, self._seen = 0.0, 0

    def after_backward(self, run: Run) -> None:
        if (run.step + 1) % self.every == 0 or run.step in (0, run.total - 1):
            self._last = depth_gradient_norms(run.model)
            self._first = self._first or self._last
            run.log({f"grad_norm/{i}": v for i, v in self._last.items()})
            second = list(matrix_gradients(run.model).values())
            if len(second) > 1 and min(second[0], second[-1]) > 0:
                self._log_ratio, self._seen = self._log_ratio + math.log(second[0] / second[-1]), self._seen + 1

    def state(self) -> dict[str, Tensor]:
        norms = {f"{i}": torch.tensor([v, self._last.get(i, v)], dtype=torch.float64) for i, v in self._first.items()}
        return {**norms, "ratio": torch.tensor([self._log_ratio, self._seen], dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        norms = {int(i): v for i, v in state.items() if i != "ratio"}
        self._first = {i: v[0].item() for i, v in norms.items()}
        self._last = {i: v[1].item() for i, v in norms.items()}
        self._log_ratio, self._seen = state["ratio"][0].item(), int(state["ratio"][1])

    def findings(self) -> Findings:
        rows: list[list] = [[i, self._first[i], self._last[i]] for i in sorted(self._first)]
        inner = [v for i, v in self._last.items() if 0 <= i < max(self._last)]
        table = Table("Gradient norm by layer", ["layer", "first step", "last step"], rows)
        ratio = {"fc2_grad_ratio": math.exp(self._log_ratio / self._seen)} if self._seen else {}
        return Findings({"grad_norm_variation": variation(inner), **ratio}, [table])
