"""A loss at the output and smaller ones at inner layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.objectives.auxiliary import AuxiliaryHeads, Read, Tap, chosen_layers
from layerwise.objectives.hinge import CLASS_LOSSES, right
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective


class DeepSupervision(Objective):
    """F = P + sum_m Q_m,  P = decay ||w_out||^2 + l(output),  Q_m = alpha_m [ decay ||w_m||^2 + l(companion m) - gamma ]_+.

    Companions are linear classifiers on inner layers; every loss reaches all weights below it, and companions go when the stage ends.
    The released code differs from the formulas: companions read raw convolutions (`tap: raw`), their losses have weight 1 and their
    own weights almost stand still (`readout_lr: 0.001`); to vanish, they are left out of a second stage.

    Source: Lee, Xie, Gallagher, Zhang and Tu 2015, "Deeply-Supervised Nets", equations 2-5 (arXiv 1409.5185), and their published
    configuration for CIFAR-10.

    Args:
        layers: that have a companion (None: all but the last).
        alpha: weight of a companion at the beginning.
        fade: `linear` takes it to 0 over the stage, `paper` is a tenth of that, `constant` leaves it.
        gamma: a companion whose regularized loss is below it has no term and no gradient (None: no such gate).
        loss: `cross-entropy`; `hinge`, one against all, as released; `multiclass-hinge`, as printed.
        decay: weight of the squared norms of the read-outs.
        read, tap: see `layerwise.objectives.auxiliary`. readout_lr: learning rate of the companions' own weights, as a factor.
    """

    def __init__(
        self,
        data: Any = None,
        *,
        layers: Sequence[int] | None = None,
        alpha: float = 0.3,
        fade: Literal["linear", "paper", "constant"] = "linear",
        gamma: float | None = None,
        loss: Literal["cross-entropy", "hinge", "multiclass-hinge"] = "cross-entropy",
        decay: float = 0.0,
        read: Read = "flat",
        tap: Tap = "layer",
        readout_lr: float = 1.0,
    ) -> None:
        super().__init__()
        if alpha < 0 or decay < 0 or readout_lr <= 0:
            raise BadInput(f"alpha and decay are >= 0 and readout_lr > 0; got {alpha}, {decay} and {readout_lr}")
        self.layers, self.alpha0, self.fade, self.gamma = layers, alpha, fade, gamma
        self.loss, self.decay, self.read, self.tap, self.readout_lr = CLASS_LOSSES[loss], decay, read, tap, readout_lr
        self.alpha = companion_weight(alpha, fade, 0, 1)
        self.companions: AuxiliaryHeads | None = None

    def attach(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        if self.alpha0:
            layers = chosen_layers(model, self.layers)
            self.companions = AuxiliaryHeads(model, batch, layers, read=self.read, tap=self.tap, lr_scale=self.readout_lr)  # type: ignore[arg-type]

    def before_step(self, step: int, total: int, divisor: float | None) -> None:
        self.alpha = companion_weight(self.alpha0, self.fade, step, total)

    def forward(self, model: Any, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        labels = batch["labels"]
        if self.companions is None or not self.alpha or not torch.is_grad_enabled():
            logits, more = model(batch, **context).logits, None
        else:
            with self.companions.watching(model) as seen:
                logits = model(batch, **context).logits
            more = self._companions(self.companions, seen, labels)
        count = torch.tensor(len(labels), device=labels.device)
        total = self.loss(logits, labels)
        if self.decay:
            total = total + self.decay * model.head.out.weight.square().sum() * count
        metrics = {"accuracy": right(logits, labels)}
        if more is not None:
            metrics["companion_loss"] = more.detach()
            total = total + more
        return Loss(total, count, metrics)

    def _companions(self, heads: AuxiliaryHeads, seen: dict[int, Tensor], labels: Tensor) -> Tensor:
        """The sum of Q_m, times the number of samples: each is a mean over them behind its gate."""
        terms = []
        for i in heads.layers:
            term = self.loss(heads(i, seen[i]), labels) / len(labels)
            if self.decay:
                term = term + self.decay * heads.squares(i)
            terms.append(term if self.gamma is None else (term - self.gamma).clamp(min=0))
        return self.alpha * len(labels) * torch.stack(terms).sum()


def companion_weight(alpha: float, fade: str, step: int, total: int) -> float:
    """alpha_m at a step: never rising, and 0 when the stage ends unless it is constant."""
    return alpha if fade == "constant" else alpha * (0.1 if fade == "paper" else 1.0) * (1 - step / total)
