"""Layers that tell inputs with their right label from inputs with a wrong one, each on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.analyze.findings import Findings
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference
from layerwise.models.heads import ClassifierHead
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective
from layerwise.stack.context import Call, Context


class ForwardForward(Objective):
    """Every layer raises its goodness, the mean square of its outputs, on true pairs and lowers it on false ones.

    The label is written over the first pixels of the image. A layer reads its input at length sqrt(width), so that how good
    the layer below found it is not seen, and is trained by softplus(threshold - g) on true pairs plus softplus(g - threshold) on false ones.
    The model's own head is not trained: a class is chosen by the goodness of all layers but the first.

    Source: Hinton 2022, "The Forward-Forward Algorithm", sections 2 and 3 (arXiv 2212.13345), on his own example: images, dense layers.

    Args:
        threshold: of the mean square.
    """

    one_process = True

    def __init__(self, data: Any = None, *, threshold: float = 2.0) -> None:
        super().__init__()
        self.threshold, self.classes = threshold, 0
        self.divisor: float | None = None

    def attach(self, model: Any, batch: Mapping[str, Any]) -> None:
        if not isinstance(model.head, ClassifierHead) or "pixel_values" not in batch:
            raise BadInput("forward-forward writes labels into images: it needs images and a head of kind classifier")
        self.classes = model.head.out.out_features

    def before_step(self, step: int, total: int, divisor: float | None) -> None:
        self.divisor = divisor

    def forward(self, model: Any, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        labels = batch["labels"]
        shift = torch.randint(1, self.classes, labels.shape, generator=generator, device=labels.device)
        both = torch.cat([self.written(batch["pixel_values"], y) for y in (labels, (labels + shift) % self.classes)])
        learning = torch.is_grad_enabled() and self.training
        losses: list[Tensor] = []

        def local(i: int, layer: nn.Module, x: Tensor, ctx: Context, call: Call) -> Tensor:
            made = call(normalized(x).detach(), ctx)
            true, false = goodness(made).chunk(2)
            loss = (F.softplus(self.threshold - true) + F.softplus(false - self.threshold)).sum()
            if learning:
                (loss / (self.divisor or len(labels))).backward()
            losses.append(loss.detach())
            return made.detach()

        model({"pixel_values": both}, around=(local, *context.pop("around", ())), **context)
        return Loss(torch.stack(losses).sum(), torch.tensor(len(labels), device=labels.device), applied=learning)

    def written(self, pixels: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        """The images with the label, one-hot, over their first pixels."""
        flat = pixels.flatten(1).clone()
        flat[:, : self.classes] = F.one_hot(labels, self.classes).to(flat.dtype)
        return flat.view_as(pixels)

    def finish(self, model: Any, data: Any) -> Findings:
        """Accuracy on the validation split of the class with the most goodness, over layers from the second on."""
        hits = count = 0.0
        with inference(model):
            for rows in batches(data.validation, 256, None, model.device):
                labels = rows["labels"]
                scores = [
                    self._goodness(model, self.written(rows["pixel_values"], torch.full_like(labels, c))) for c in range(self.classes)
                ]
                hits += (torch.stack(scores, dim=1).argmax(dim=1) == labels).sum().item()
                count += len(labels)
        return Findings({"goodness_choice_accuracy": hits / max(count, 1)})

    def _goodness(self, model: Any, pixels: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def note(i: int, layer: nn.Module, x: Tensor, ctx: Context, call: Call) -> Tensor:
            made = call(normalized(x), ctx)
            kept.append(goodness(made))
            return made

        model({"pixel_values": pixels}, around=(note,))
        return torch.stack(kept[1:] or kept).sum(dim=0)


def normalized(x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """Each sample at root mean square 1."""
    return x * x.flatten(1).square().mean(dim=1).add(1e-8).rsqrt().view(-1, *[1] * (x.dim() - 1))


def goodness(x: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """The mean square of each sample's outputs."""
    return x.flatten(1).square().mean(dim=1)
