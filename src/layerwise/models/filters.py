"""Small trained maps beside a stack that read what its layers hand on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerwise.models.spec import FilterSpec
from layerwise.nn.ffn import activation


class Filters(nn.Module):
    """One map (..., width) -> (..., size) for each of some layers; the model's own output does not depend on them.

    Source: Liang et al. 2023, "Less is More: Task-aware Layer-wise Distillation" (arXiv 2210.01351), section 3: a linear map, or two
    with an activation between.
    """

    def __init__(self, spec: FilterSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        inner = spec.size if spec.activation is None else width
        self.first = nn.ModuleDict({str(i): nn.Linear(width, inner) for i in spec.layers})
        self.second = nn.ModuleDict({str(i): nn.Linear(width, spec.size) for i in spec.layers}) if spec.activation else None

    @property
    def layers(self) -> tuple[int, ...]:
        return self.spec.layers

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """What the filter of a layer makes of its output; the output itself where the layer has none."""
        if layer not in self.spec.layers:
            return hidden
        made = self.first[str(layer)](hidden)
        return (
            made if self.second is None or self.spec.activation is None else self.second[str(layer)](activation(self.spec.activation)(made))
        )

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """Uniform with the bound of `nn.Linear`, 1 / sqrt(in), biases too, whatever the stack's `std`."""
        for parameter_list in (self.first, self.second):
            for linear in () if parameter_list is None else parameter_list.values():
                assert isinstance(linear, nn.Linear)
                bound = linear.in_features**-0.5
                for parameter in linear.parameters():
                    nn.init.uniform_(parameter, -bound, bound, generator=generator)
