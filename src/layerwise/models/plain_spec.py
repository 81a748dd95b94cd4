"""Stacks of convolutional and dense layers: plain data, no tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from layerwise.errors import BadInput
from layerwise.stack.spec import FORBID


@dataclass(frozen=True)
class PlainLayerSpec:
    """One layer of a convolutional or dense network.

    Attributes:
        kind: `conv` is convolution, norm, ReLU; `residual` is two of them around an identity (He et al. 2016, figure 2),
            with a 1x1 projection where shapes differ; `dense` is linear, norm, ReLU on vectors.
        channels: of the output. inner: of the input (None: the layer below's).
        size: of the kernel. stride: of its steps. pool: 2x2 max pooling after the layer.
        norm: batch or group norm (groups of `group` channels), or none.
        affine: norms have a trained gain and shift. bias: linears and convolutions have a bias.
        dropout: on the output.
    """

    kind: Literal["conv", "residual", "dense"] = "conv"
    channels: int = 32
    inner: int | None = None
    size: int = 3
    stride: int = 1
    pool: bool = False
    norm: Literal["batch", "group", "none"] = "batch"
    group: int = 8
    affine: bool = True
    bias: bool = False
    dropout: float = 0.0

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.channels < 1 or self.size < 1 or self.stride < 1:
            raise BadInput(f"channels, size and stride are at least 1; got {self.channels}, {self.size}, {self.stride}")
        if self.kind == "residual" and self.size % 2 == 0:
            raise BadInput(f"a residual layer needs an odd size, so that what it adds has the input's shape; it is {self.size}")
        if self.kind == "dense" and (self.pool or self.stride != 1):
            raise BadInput("a dense layer reads vectors: it has no pool and no stride")
        if self.norm == "group" and (self.group < 1 or self.channels % self.group):
            raise BadInput(f"group norm needs channels ({self.channels}) to be a multiple of group ({self.group})")


@dataclass(frozen=True)
class PlainStackSpec:
    """Layers one after another, each fed by the one below.

    Attributes:
        layers: bottom first.
        inputs: channels (or vector size) that enter the first layer (None: the data's; filled in when the job runs).
    """

    layers: tuple[PlainLayerSpec, ...] = field(default_factory=tuple)
    inputs: int | None = None

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if not self.layers:
            raise BadInput("layers is empty: a network needs at least one layer")
        if len({layer.kind == "dense" for layer in self.layers}) > 1:
            raise BadInput("dense layers read vectors and convolutions read maps: a stack is all of the one or all of the other")
        below, linked = self.inputs, []
        for i, layer in enumerate(self.layers):
            if layer.inner is not None and below is not None and layer.inner != below:
                raise BadInput(f"layer {i} takes {layer.inner} channels but the layer below makes {below}")
            linked.append(dataclasses.replace(layer, inner=layer.inner or below))
            below = layer.channels
        object.__setattr__(self, "layers", tuple(linked))

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        """Channels of the output."""
        return self.layers[-1].channels

    def with_layers(self, layers: Sequence[PlainLayerSpec]) -> PlainStackSpec:
        return PlainStackSpec(tuple(layers), self.inputs)
