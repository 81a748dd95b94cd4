"""Stacks of convolutional and dense layers: plain data, no tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from layerwise.complaint import FORBID
from layerwise.errors import BadInput

BOTTLENECK = {"middle": None, "stride_first": False, "dilation": 1, "project": None, "padding": "half", "standardize": None}
"""Fields that only bottlenecks have, and their neutral values."""


@dataclass(frozen=True)
class PlainLayerSpec:
    """One layer of a convolutional or dense network.

    Attributes:
        kind: `conv` is convolution, norm, ReLU; `residual` is two of them around an identity (He et al. 2016, figure 2),
            with a 1x1 projection where shapes differ; `bottleneck` is 1x1, `size`, 1x1 convolutions around an identity (figure 5);
            `preactivation` is the same with norm and ReLU before each convolution and nothing after the sum (He et al. 2016,
            "Identity Mappings", figure 4e); `dense` is linear, norm, ReLU on vectors.
        channels: of the output. inner: of the input (None: the layer below's).
        middle: channels between the convolutions of a bottleneck (None: a quarter of `channels`).
        size: of the kernel. stride: of its steps; `stride_first` steps in a bottleneck's first convolution (the first ResNets)
            instead of the middle one. dilation: of the kernel. pool: 2x2 max pooling after the layer.
        project: a 1x1 convolution on the way around a bottleneck (None: where shapes differ).
        padding: `half` is size // 2 on every side, `same` is TensorFlow's (for bottlenecks).
        standardize: filters are standardized with this epsilon (None: not; for bottlenecks), see `layerwise.nn.convolution`.
        norm: batch or group norm (groups of `group` channels, or `groups` groups where that is given), or none.
        affine: norms have a trained gain and shift. bias: linears and convolutions have a bias.
        dropout: on the output.
    """

    kind: Literal["conv", "residual", "bottleneck", "preactivation", "dense"] = "conv"
    channels: int = 32
    inner: int | None = None
    middle: int | None = None
    size: int = 3
    stride: int = 1
    stride_first: bool = False
    dilation: int = 1
    project: bool | None = None
    padding: Literal["half", "same"] = "half"
    standardize: float | None = None
    pool: bool = False
    norm: Literal["batch", "group", "none"] = "batch"
    group: int = 8
    groups: int | None = None
    affine: bool = True
    bias: bool = False
    dropout: float = 0.0

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.channels < 1 or self.size < 1 or self.stride < 1:
            raise BadInput(f"channels, size and stride are at least 1; got {self.channels}, {self.size}, {self.stride}")
        if self.kind in ("residual", "bottleneck", "preactivation") and self.size % 2 == 0:
            raise BadInput(f"a {self.kind} layer needs an odd size, so that what it adds has the input's shape; it is {self.size}")
        if self.kind == "dense" and (self.pool or self.stride != 1):
            raise BadInput("a dense layer reads vectors: it has no pool and no stride")
        if self.norm == "group" and self.groups is None and (self.group < 1 or self.channels % self.group):
            raise BadInput(f"group norm needs channels ({self.channels}) to be a multiple of group ({self.group})")
        if self.groups is not None and (self.groups < 1 or any(c % self.groups for c in (self.channels, self.narrow, self.inner or 0))):
            raise BadInput(
                f"groups ({self.groups}) divides the channels of every norm: {self.channels}, {self.narrow} between, {self.inner} before"
            )
        if (self.middle is not None and self.middle < 1) or self.dilation < 1:
            raise BadInput(f"middle and dilation are at least 1; got {self.middle} and {self.dilation}")
        wrong = [name for name, plain in BOTTLENECK.items() if not self.bottleneck and getattr(self, name) != plain]
        if wrong:
            raise BadInput(f"{wrong[0]} is for layers of kind bottleneck or preactivation; this one is {self.kind}")

    @property
    def bottleneck(self) -> bool:
        """Whether the layer is three convolutions around an identity."""
        return self.kind in ("bottleneck", "preactivation")

    @property
    def narrow(self) -> int:
        """Channels between the convolutions."""
        if not self.bottleneck:
            return self.channels
        return max(self.channels // 4, 1) if self.middle is None else self.middle

    @property
    def projected(self) -> bool:
        """Whether a 1x1 convolution stands on the way around the layer."""
        return (self.stride != 1 or self.inner != self.channels) if self.project is None else self.project


@dataclass(frozen=True)
class PlainStackSpec:
    """Layers one after another, each fed by the one below.

    Attributes:
        layers: bottom first.
        inputs: channels (or vector size) that enter the first layer (None: the data's; filled in when the job runs).
        final_norm: a norm and ReLU on the output, of the kind that the last layer has; pre-activation layers need one.
    """

    layers: tuple[PlainLayerSpec, ...] = field(default_factory=tuple)
    inputs: int | None = None
    final_norm: bool = False

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
        return dataclasses.replace(self, layers=tuple(layers))
