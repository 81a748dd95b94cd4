"""Two towers: texts and images become vectors that can be compared."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.models.model import Model, Output
from layerwise.models.spec import TwoTowersSpec


@dataclasses.dataclass
class TwoTowersOutput:
    """What a forward pass of both towers made; None where the batch had nothing for a tower.

    Attributes:
        text, image: the towers' own outputs.
        text_embeds, image_embeds: their projections at length 1, (b, size).
        scale: what cosines are multiplied by.
    """

    text: Output | None
    image: Output | None
    text_embeds: Float[Tensor, "t size"] | None
    image_embeds: Float[Tensor, "i size"] | None
    scale: Float[Tensor, ""]

    @property
    def hiddens(self) -> tuple[Tensor, ...]:
        """Every layer's output, the text tower's before the image tower's, if `hiddens=True` was asked for."""
        return tuple(h for tower in (self.text, self.image) if tower is not None for h in tower.hiddens or ())

    @property
    def logits(self) -> Float[Tensor, "i t"]:
        """Scaled cosine of every image with every text. Raises BadInput when the batch had only one of them."""
        if self.image_embeds is None or self.text_embeds is None:
            raise BadInput("images are compared with texts: the batch needs pixel_values and input_ids")
        return self.scale * self.image_embeds @ self.text_embeds.T


class TwoTowers(nn.Module):
    """A text and an image model whose projections are compared by a scaled cosine.

    Layers are numbered through both towers, those of the text tower first, as `layerwise.view` does.
    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.3.
    """

    def __init__(self, spec: TwoTowersSpec) -> None:
        super().__init__()
        self.spec = spec
        self.text = Model(spec.text)
        self.image = Model(spec.image)
        self.logit_scale = nn.Parameter(torch.empty(()))

    @property
    def causal(self) -> bool:
        return self.spec.causal

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def forward(self, batch: Mapping[str, Any], *, path: Sequence[int] | None = None, **context: Any) -> TwoTowersOutput:
        """Run the towers that the batch has something for.

        Args:
            batch: `input_ids` (t, s) with optional `attention_mask`, and `pixel_values` (i, c, h, w).
            path: the layers to run, numbered through both towers; each tower runs its own in that order.
            context: as for `Model.forward`.
        """
        below = self.text.stack.depth
        ways = (None, None) if path is None else ([i for i in path if i < below], [i - below for i in path if i >= below])
        text = self.text(batch, path=ways[0], **context) if "input_ids" in batch else None
        image = self.image(batch, path=ways[1], **context) if "pixel_values" in batch else None
        return TwoTowersOutput(text, image, _unit(text), _unit(image), self.logit_scale.exp())

    def with_towers(self, *, text: Model | None = None, image: Model | None = None) -> TwoTowers:
        """This model with another tower or two; what is not given is shared."""
        new = copy.copy(self)
        new._modules = {**self._modules, "text": text or self.text, "image": image or self.image}
        new.spec = TwoTowersSpec(new.text.spec, new.image.spec)
        return new

    def initialize(self, generator: torch.Generator) -> TwoTowers:
        """Fresh weights, in place; cosines are divided by 0.07 at first."""
        self.text.initialize(generator)
        self.image.initialize(generator)
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))
        return self


def _unit(output: Output | None) -> Tensor | None:
    if output is None:
        return None
    projected = output.logits
    return projected / projected.norm(dim=-1, keepdim=True)
