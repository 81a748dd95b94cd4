"""ReLoRA: low-rank terms merged into their frozen matrices and started anew while training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from layerwise.errors import BadInput
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class RestartAdapters(Policy):
    """Every `every` steps, folds every low-rank term into its matrix, resets the term and its optimizer state, and warms up again.

    What it draws comes from the run's seed and the step, and the ramp is a function of the step: a resumed run needs no state.
    Source: Lialin et al. 2023, "ReLoRA: High-Rank Training Through Low-Rank Updates", section 3 (arXiv 2307.05695), with the
    whole optimizer state of a restarted term set to zero (the paper prunes 99 % of it by magnitude).

    Args:
        every: steps between restarts. rewarm: steps in which the learning rate climbs back to its schedule after one.
    """

    def __init__(self, *, every: int = 100, rewarm: int = 10) -> None:
        if every < 1 or not 0 <= rewarm < every:
            raise BadInput(f"every >= 1 and 0 <= rewarm < every; got {every} and {rewarm}")
        self.every, self.rewarm = every, rewarm
        self._linears: list[Any] = []

    def start(self, run: Run) -> None:
        self._linears = [m for m in run.model.modules() if hasattr(m, "fold")]
        if not self._linears:
            raise BadInput("restart-adapters needs linears that can be folded (lora, qlora): set model.stack.layer.linears")

    def before_step(self, run: Run) -> None:
        since = run.step % self.every
        if run.step < self.every:
            return
        if since == 0:
            generator = torch.Generator(device=run.device).manual_seed((run.seed * 1_000_003 + run.step) & 0x7FFF_FFFF)
            for linear in self._linears:
                linear.fold(generator)
                for parameter in (linear.lora_a, linear.lora_b):
                    for value in run.optimizer.state.get(parameter, {}).values():
                        if isinstance(value, torch.Tensor) and value.is_floating_point():
                            value.zero_()
        if since < self.rewarm:
            run.ramp = (since + 1) / (self.rewarm + 1)
