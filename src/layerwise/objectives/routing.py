"""Training the routers that let a prompt skip layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.infer.routes import routed_layers
from layerwise.nn.sequence_router import GATING, Gating
from layerwise.objectives.language import CausalLM
from layerwise.objectives.loss import Loss


class RouterLM(CausalLM):
    """L = CE + decay sum_i |w_i|^2 + skipping sum_i mean_t rho_i: routers alone learn which layers the next tokens can do without.

    Everything but the routers is frozen for the stage. Layers are mixed with their input while training, `gate: soft`; without
    gradients (validation) they run or do not, as afterwards, and the loss is the cross-entropy alone.

    Source: Jain et al. 2024, "FiRST" (arXiv 2410.12513), phase 1; decay 0.01 is theirs, `skipping` is searched for the share wanted.

    Args:
        skipping: weight of the penalty on layers that run, a token of the loss.
        decay: of the routers' squared weights and biases.
        gate: see `layerwise.nn.sequence_router.Gating`. `straight-through` trains with what is run later: one decision a prompt.
    """

    def __init__(
        self, data: Any = None, *, skipping: float = 0.1, decay: float = 0.01, gate: Literal["soft", "straight-through"] = "soft"
    ) -> None:
        super().__init__()
        if skipping < 0 or decay < 0:
            raise BadInput(f"skipping and decay are >= 0; got {skipping} and {decay}")
        self.skipping, self.decay, self.gate = skipping, decay, gate
        self._before: list[tuple[torch.nn.Parameter, bool]] = []

    @staticmethod
    def check(spec: Any) -> None:
        """Raises BadInput: the model has no routers."""
        routed_layers(spec, "router-lm")

    def attach(self, model: Any, batch: Mapping[str, Any]) -> None:
        self.check(model.spec)
        self._before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".router." in name)

    def finish(self, model: Any, data: Any) -> None:
        for parameter, trained in self._before:
            parameter.requires_grad_(trained)

    def forward(self, model: Any, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        if not torch.is_grad_enabled():
            return super().forward(model, batch, generator, **context)
        gating = Gating(self.gate)
        loss = super().forward(model, batch, generator, **context, extras={GATING: gating})
        routers = [layer.router for layer in model.stack.layers if layer.router is not None]
        weights = sum(p.square().sum() for router in routers for p in router.parameters())
        penalty = self.skipping * running(gating, batch) + self.decay * weights
        skipped = torch.stack([(gating.means[i] <= model.stack.layers[i].spec.router.threshold).float().mean() for i in gating.means])
        return Loss(
            loss.total + loss.count * penalty,
            loss.count,
            {"cross_entropy": loss.total.detach(), "skipped": loss.count * skipped.sum() / model.stack.depth},
        )


def running(gating: Gating, batch: Mapping[str, Any]) -> Tensor:
    """sum_i mean_t rho_i, over the tokens that are no padding; of straight-through gates the prompts' means."""
    if gating.gate == "straight-through":
        return torch.stack([mean.mean() for mean in gating.means.values()]).sum()
    valid = batch.get("attention_mask")
    weight = torch.ones_like(batch["input_ids"]) if valid is None else valid
    return torch.stack([(rho * weight).sum() for rho in gating.rho.values()]).sum() / weight.sum()
