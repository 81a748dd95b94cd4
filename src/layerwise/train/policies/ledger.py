"""What a training stage really costs: bytes and operations, measured, beside what formulas say."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from layerwise.analyze.cost import Operations
from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.analyze.ledger import LiveGradients, SavedTensors, parameter_bytes, state_bytes
from layerwise.optim.memory import state_formula, trained_sizes
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class Ledger(Policy):
    """Measures steps of training and leaves their cost as metrics and as a table with theory beside it.

    Metrics:
        param_bytes: parameters and buffers of model and objective.
        grad_bytes: most bytes of gradients at once. optimizer_bytes: tensors of the optimizer's state.
        activation_bytes: most bytes that autograd had saved at once, parameters left out.
        state_bytes: parameters, gradients and optimizer state together.
        train_flops: operations of all forward and backward passes of the stage, a multiply-add counted as two.

    Memory is the most of the measured steps. Steps in between are taken to cost what the last measured one did, so `every`
    must not jump over changes of what a step does.

    Args:
        every: steps between measured ones. The first two are always measured: the first may do what no other does, as LoQT's,
            which updates and trains no adapter.
    """

    def __init__(self, *, every: int = 100) -> None:
        self.every = every
        self.flops = self._step_flops = 0.0
        self.bytes = {"param_bytes": 0, "grad_bytes": 0, "optimizer_bytes": 0, "activation_bytes": 0}
        self._formula: dict[str, float | None] = {}
        self._open: contextlib.ExitStack | None = None
        self._counter: Operations
        self._saved: SavedTensors
        self._gradients: LiveGradients

    def before_step(self, run: Run) -> None:
        if run.step > 1 and run.step % self.every and self._step_flops:
            return
        modules: list[nn.Module] = [run.model, run.objective]
        parameters = [p for m in modules for p in m.parameters()]
        self._open = contextlib.ExitStack()
        self._gradients = self._open.enter_context(LiveGradients(parameters))
        self._counter = self._open.enter_context(Operations())
        self._saved = self._open.enter_context(SavedTensors(parameters))

    def after_backward(self, run: Run) -> None:
        if self._open is not None:
            self._open.close()
            self._step_flops = float(self._counter.total)
        self.flops += self._step_flops

    def after_step(self, run: Run) -> None:
        if run.logs:
            run.log({"train_flops": self.flops})
        if self._open is None:
            return
        self._open = None
        modules: list[nn.Module] = [run.model, run.objective]
        seen = {
            "param_bytes": parameter_bytes(*modules),
            "grad_bytes": self._gradients.peak,
            "optimizer_bytes": state_bytes(run.optimizer),
            "activation_bytes": self._saved.peak,
        }
        self.bytes = {name: max(self.bytes[name], value) for name, value in seen.items()}
        trained = [p for m in modules for p in m.parameters() if p.requires_grad]
        state = state_formula(run.spec.optimizer, trained_sizes(nn.ModuleList(modules)))
        size = trained[0].element_size()
        self._formula = {
            "param_bytes": sum(p.numel() * p.element_size() for m in modules for p in m.parameters()),
            "grad_bytes": sum(p.numel() * p.element_size() for p in trained),
            "optimizer_bytes": None if state is None else state * size,
            "train_flops": _six_n(run),
        }

    def state(self) -> dict[str, Tensor]:
        values = [self.flops, self._step_flops, *self.bytes.values()]
        return {"sums": torch.tensor(values, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.flops, self._step_flops, *sizes = state["sums"].tolist()
        self.bytes = dict(zip(self.bytes, (int(s) for s in sizes), strict=True))

    def findings(self) -> Findings:
        metrics: dict[str, float] = {**self.bytes, "train_flops": self.flops}
        metrics["state_bytes"] = sum(self.bytes[name] for name in ("param_bytes", "grad_bytes", "optimizer_bytes"))
        rows: list[list[Cell]] = [
            ["parameters (bytes)", self.bytes["param_bytes"], self._formula.get("param_bytes")],
            ["gradients (bytes)", self.bytes["grad_bytes"], self._formula.get("grad_bytes")],
            ["optimizer state (bytes)", self.bytes["optimizer_bytes"], self._formula.get("optimizer_bytes")],
            ["saved activations (bytes)", self.bytes["activation_bytes"], None],
            ["operations of the stage", self.flops, self._formula.get("train_flops")],
        ]
        return Findings(metrics, [Table("What training costs", ["", "measured", "by formula"], rows)])


def _six_n(run: Run) -> float:
    """6 N operations a token for the N weights that multiply (Kaplan et al. 2020, section 2.1), attention's scores left out."""
    tables = {id(p) for m in run.model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    weights = sum(p.numel() for p in run.model.parameters() if p.dim() >= 2 and id(p) not in tables)
    head = getattr(getattr(run.model, "spec", None), "head", None)
    if getattr(head, "tie", False):
        weights += run.model.token_matrix.numel()
    per_step = run.spec.batch * max(getattr(run.data.train, "tokens_per_row", 0), 1)
    return 6.0 * weights * per_step * run.total
