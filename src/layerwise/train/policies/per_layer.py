"""Updates inside the backward pass: each gradient is used and freed as soon as it is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.optim import OPTIMIZERS
from layerwise.table import lookup
from layerwise.train.alone import alone
from layerwise.train.policies.policy import Policy
from layerwise.train.spec import TrainSpec

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class PerLayerUpdates(Policy):
    """Steps the optimizer for a parameter the moment its gradient is there, and frees the gradient: two never meet.

    The weights are those of ordinary training without clipping, bit for bit, for optimizers that treat every parameter on its
    own. State and checkpoints are the optimizer's own.
    Source: Lv et al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), section 3;
    used by Han et al. 2024 (SLTrain) and Loeschcke et al. 2024 (LoQT).
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._squares: list[Tensor] = []

    @staticmethod
    def check(spec: TrainSpec) -> None:
        """Refuse what needs all gradients at once."""
        if spec.clip is not None:
            raise BadInput("per-layer-updates frees each gradient before the norm of all is known: set clip: null")
        if getattr(lookup(OPTIMIZERS, spec.optimizer.name, "optimizer"), "together", False):
            raise BadInput(
                f"per-layer-updates steps each parameter alone, but {spec.optimizer.name} compares the gradients of all: use another optimizer"
            )
        if spec.accumulate != 1:
            raise BadInput("per-layer-updates uses each gradient at once, so nothing can be accumulated: set accumulate: 1")

    def start(self, run: Run) -> None:
        alone("the policy per-layer-updates")
        self.check(run.spec)

    def before_step(self, run: Run) -> None:
        if self._hooks:
            return
        optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                single = _alone(optimizer, parameter)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._hook(single, group)))

    def _hook(self, single: torch.optim.Optimizer, group: dict[str, Any]) -> Any:
        def use(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            self._squares.append(parameter.grad.detach().square().sum())
            single.param_groups[0].update({k: v for k, v in group.items() if k != "params"})
            single.step()
            parameter.grad = None

        return use

    def after_backward(self, run: Run) -> None:
        run.norm = torch.stack(self._squares).sum().sqrt() if self._squares else None
        self._squares = []

    def end(self, run: Run) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _alone(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.optim.Optimizer:
    """The same optimizer over one of its parameters; the state is shared with the whole one."""
    single = object.__new__(type(optimizer))
    single.__dict__ = {**optimizer.__dict__, "param_groups": [{"params": [parameter]}]}
    return single
