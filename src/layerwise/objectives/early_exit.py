"""A language model of which every depth predicts, through the same final norm and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.objectives.language import next_tokens, score_labels
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective


class EarlyExit(Objective):
    """J = sum_l w(t, l) CE(head(norm(x_{l+1})), next token), the weights growing with the square of the depth.

    Without gradients (validation) it is the last layer's loss alone, so that runs with and without exits compare.

    Source: Elhoushi et al. 2024, "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding", section 4.1.2
    (arXiv 2404.16710). The paper does not say where the rotation begins; here layer l is on at step t when `every` divides l - t.

    Args:
        scale: of the inner layers' weights, e_scale.
        curriculum: `rotational` has every `every`-th layer on, shifted by one each step; `gradual` begins with the last layer and has
            all of them on after half the stage; `none` has all on. The last layer always is.
    """

    def __init__(
        self, data: Any = None, *, scale: float = 0.2, curriculum: Literal["rotational", "gradual", "none"] = "rotational", every: int = 8
    ) -> None:
        super().__init__()
        if scale < 0 or every < 1:
            raise BadInput(f"scale is >= 0 and every >= 1; got {scale} and {every}")
        self.scale, self.curriculum, self.every = scale, curriculum, every
        self.step, self.steps = 0, 1

    def attach(self, model: Any, batch: Mapping[str, Any]) -> None:
        if getattr(model, "decoder", None) is not None:
            raise BadInput("early-exit-lm trains a decoder alone; this model is an encoder-decoder")

    def before_step(self, step: int, total: int, divisor: float | None) -> None:
        self.step, self.steps = step, total

    def forward(self, model: Any, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        target = next_tokens(batch)
        if not torch.is_grad_enabled():
            return score_labels(model, model(batch, **context).hidden[:, :-1], target)
        out = model(batch, hiddens=True, **context)
        depth = len(out.hiddens)
        weights = exit_weights(depth, self.scale, enabled(self.curriculum, self.every, depth, self.step, self.steps))
        final = score_labels(out.model, out.hidden[:, :-1], target)
        total = weights[-1] * final.total
        for hidden, weight in zip(out.hiddens[:-1], weights[:-1], strict=True):
            if weight:
                total = total + weight * score_labels(out.model, normed(model, hidden[:, :-1]), target).total
        return Loss(total, final.count, {"last_layer_loss": final.total.detach()})


def normed(model: Any, stream: Tensor) -> Tensor:
    """The stream after any layer, as the final norm hands it to the head."""
    return stream if model.stack.norm is None else model.stack.norm(stream)


def exit_weights(depth: int, scale: float, on: list[bool]) -> list[float]:
    """One weight a layer, 0 where it is off, with sum 1: inner layer l has scale * (0 + ... + l), the last depth - 1 plus all below it."""
    raw = [scale * layer * (layer + 1) / 2 for layer in range(depth - 1)]
    raw.append(depth - 1 + scale * (depth - 2) * (depth - 1) / 2 if depth > 1 else 1.0)
    raw = [e if active else 0.0 for e, active in zip(raw, on, strict=True)]
    return [e / sum(raw) for e in raw]


def enabled(curriculum: str, every: int, depth: int, step: int, steps: int) -> list[bool]:
    """Which layers have a loss at a step of a stage."""
    if curriculum == "rotational":
        on = [(layer - step) % every == 0 for layer in range(depth)]
    elif curriculum == "gradual":
        on = [depth - layer <= 1 + 2 * depth * step // steps for layer in range(depth)]
    else:
        on = [True] * depth
    on[-1] = True
    return on
