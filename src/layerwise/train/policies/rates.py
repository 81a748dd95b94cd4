"""Learning rates that change while training goes on, a group of parameters at a time.

A policy of this kind names the parameters of each group before the optimizer is made, and later gives the groups weights. A group's peak
learning rate is then lr x (what its depth gives it) x weight, which schedule and warm-up multiply as always; weight decay, which
optimizers multiply by the learning rate, follows. Moments, gradients and generators are left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.analyze.gradients import mean_gradients
from layerwise.errors import BadInput
from layerwise.train.parallel import shards
from layerwise.train.policies.policy import Policy
from layerwise.train.spec import TrainSpec

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class GroupRates(Policy):
    """What the two policies share: named groups, and a weight for each."""

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self._named: list[Any] = []

    def name(self, parameters: dict[str, list[Any]]) -> None:
        """Put parameters into groups of their own; before the optimizer is made."""
        for group, members in parameters.items():
            for parameter in members:
                if hasattr(parameter, "group"):
                    raise BadInput(f"two policies set the learning rate of one parameter (in {group}): use one of them")
                parameter.__dict__["group"] = group
                self._named.append(parameter)
        self.weights = dict.fromkeys(parameters, 1.0)

    def before_step(self, run: Run) -> None:
        for group in run.optimizer.param_groups:
            if group.get("name") in self.weights:
                group["initial_lr"] = run.spec.optimizer.lr * group["lr_scale"] * self.weights[group["name"]]

    def end(self, run: Run) -> None:
        for parameter in self._named:
            del parameter.__dict__["group"]
        self._named = []

    def state(self) -> dict[str, Tensor]:
        return {"weights": torch.tensor(list(self.weights.values()), dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.weights = dict(zip(self.weights, state["weights"].tolist(), strict=True))


class ImportanceRates(GroupRates):
    """A learning rate for every tensor, low where the tensor matters to the probe: 2 (1 - I) times the usual one, I in [0, 1].

    Every `every` steps the importance of each trained tensor on the stage's `probe` is measured anew: the mean over its entries of |weight| x
    mean over batches of |gradient| (`signed`: of weight x gradient, which may cancel), then rescaled so that the least important has I = 0
    and the most important I = 1. Until the first measurement, and where all are equal, every tensor has the usual rate: a fresh identity
    copy has importance 0 throughout, as either the weight or the gradient is zero. The probe's gradients are never stepped.

    Source: Zhang et al. 2025, "ADEPT: Continual Pretraining via Adaptive Expansion and Dynamic Decoupled Tuning" (arXiv 2510.10071),
    section 3.2 (signed), and its published code (absolute).

    Args:
        every: steps between measurements. samples, split, batch: rows of the probe. objective: whose loss.
    """

    probes = True

    def __init__(
        self,
        *,
        every: int = 500,
        samples: int = 64,
        split: str = "train",
        batch: int = 16,
        objective: str = "causal-lm",
        signed: bool = False,
    ) -> None:
        super().__init__()
        if every < 1:
            raise BadInput(f"every is a number of steps, at least 1; it is {every}")
        self.every, self.signed = every, signed
        self.probe: dict[str, Any] = {"samples": samples, "split": split, "batch": batch, "objective": objective}
        self.importance: dict[str, float] = {}

    @staticmethod
    def check(spec: TrainSpec) -> None:
        """Refuse shards, of which no gradient is whole."""
        if spec.parallel == "fsdp":
            raise BadInput(
                "importance-rates differentiates the probe's loss in each process, which needs whole parameters: use parallel: ddp"
            )

    def start(self, run: Run) -> None:
        if run.probe is None or shards(run.spec):
            raise BadInput("importance-rates needs a probe, a second data set, and whole parameters (parallel: ddp)")
        self.name({n: [p] for n, p in run.model.named_parameters() if p.requires_grad})

    def after_step(self, run: Run) -> None:
        if run.step % self.every or run.step == run.total:
            return
        gradients = mean_gradients(run.model, run.probe, self.weights, absolute=not self.signed, **self.probe)
        parameters = dict(run.model.named_parameters())
        self.importance = {n: importance(parameters[n].detach(), g, signed=self.signed) for n, g in gradients.items()}
        self.weights = rates(self.importance)

    def findings(self) -> Findings:
        rows: list[list[Cell]] = [[n, self.importance.get(n), w] for n, w in self.weights.items()]
        return Findings(tables=[Table("Learning rates by importance, as last measured", ["tensor", "importance", "times the usual"], rows)])


def importance(weight: Tensor, gradient: Tensor, *, signed: bool = False) -> float:
    """First-order Taylor importance of a tensor: the mean over its entries of |weight| |gradient|, or of weight x gradient."""
    product = weight.double() * gradient.double()
    return (product if signed else product.abs()).mean().item()


def rates(importances: dict[str, float]) -> dict[str, float]:
    """2 (max - I) / (max - min) for each, in [0, 2]; 1 for all where they do not differ."""
    low, high = min(importances.values()), max(importances.values())
    return {n: 2 * (high - i) / (high - low) if high > low else 1.0 for n, i in importances.items()}


class CapacityRates(GroupRates):
    """Layers learn faster the more of their tokens are active: c_l + (1 - mean c) times the usual rate for a layer of capacity c_l.

    The capacities are the objective's (`token-router-lm`) and move while it trains; what has no router keeps the usual rate.
    Source: Tan et al. 2024, "DLO" (arXiv 2407.11030), and its published code.
    """

    @staticmethod
    def check(spec: TrainSpec) -> None:
        """Refuse objectives that know no capacities."""
        if spec.objective != "token-router-lm":
            raise BadInput(f"capacity-rates reads the capacities of the objective token-router-lm; this stage trains {spec.objective}")

    def start(self, run: Run) -> None:
        self.name({f"layer {i}": list(run.model.stack.layers[i].parameters()) for i in run.objective.routed})

    def before_step(self, run: Run) -> None:
        capacities = run.objective.capacities()
        spare = 1 - sum(capacities.values()) / len(capacities)
        self.weights = {f"layer {i}": c + spare for i, c in capacities.items()}
        super().before_step(run)
