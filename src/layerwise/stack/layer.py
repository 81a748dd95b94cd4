"""A layer of the stack, made from its spec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.nn.attention import Attention
from layerwise.nn.ffn import FeedForward
from layerwise.nn.gates import StreamGate
from layerwise.nn.norms import make_norm
from layerwise.nn.residual import Residual
from layerwise.nn.sequence_router import SequenceRouter
from layerwise.nn.token_router import TokenRouter
from layerwise.stack.spec import LayerSpec, StackSpec
from layerwise.table import lookup

if TYPE_CHECKING:
    from layerwise.nn.cache import Slot
    from layerwise.stack.context import Context

MIXERS = {"attention": "layerwise.nn.attention:Attention", "binary-attention": "layerwise.nn.binary_attention:BinaryAttention"}
LAYERS = {"LayerSpec": "layerwise.stack.layer:Layer", "PlainLayerSpec": "layerwise.models.bottleneck:make_plain"}
FINAL_NORMS = {"PlainStackSpec": "layerwise.models.plain:PlainNorm"}


class Layer(nn.Module):
    """A transformer layer: mixer, optional cross-attention, feed-forward, each a `Residual` branch.

    Args:
        spec: resolved (see `LayerSpec.resolve`).
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.mixer = Residual(lookup(MIXERS, spec.mixer, "mixer")(spec), spec, norm_out=spec.mixer_norm)
        self.cross = Residual(Attention(spec, cross=True), spec) if spec.cross else None
        self.ffn = Residual(FeedForward(spec), spec, gain=spec.residual_gain)
        self.gate = StreamGate(preserve=spec.stream_gate == "gpas") if spec.stream_gate else None
        self.router: SequenceRouter | TokenRouter | None = None
        if spec.router is not None and spec.width:
            self.router = (SequenceRouter if spec.router.decides == "layer" else TokenRouter)(spec.width, spec.router)

    def forward(self, x: Float[Tensor, "b s width"], ctx: Context, slot: Slot) -> Float[Tensor, "b s width"]:
        return self.router.gated(x, ctx, slot, self._whole) if isinstance(self.router, SequenceRouter) else self._whole(x, ctx, slot)

    def _whole(self, x: Tensor, ctx: Context, slot: Slot) -> Tensor:
        if self.spec.parallel:
            x = x + self.mixer.change(x, ctx, slot) + self.ffn.change(x)
            return x if self.gate is None else self.gate(x)
        entered = x
        x = self.mixer(x, ctx, slot, gate=self.gate)
        if self.cross is not None:
            x = self.cross(x, ctx, slot, gate=self.gate)
        if isinstance(self.router, TokenRouter):
            return self.router.routed(entered, x, self.ffn, ctx, slot[0])
        return self.ffn(x, gate=self.gate)

    def initialize(self, std: float, write_std: float, depth: int, generator: torch.Generator) -> None:
        """Fresh weights; `write_std` is for the matrices that write into the residual stream."""
        for branch in (self.mixer, self.cross, self.ffn):
            if branch is not None:
                branch.initialize(std, write_std, depth, generator)
        if self.gate is not None:
            nn.init.zeros_(self.gate.alpha)
        if self.router is not None:
            self.router.initialize()


def make_final_norm(spec: Any) -> nn.Module | None:
    """The norm on the output of a stack that a spec of any kind describes, if it has one."""
    if not getattr(spec, "final_norm", False):
        return None
    if isinstance(spec, StackSpec):
        return make_norm(spec.layer.norm, spec.width, spec.layer.norm_eps, spec.layer.norm_bias)
    return lookup(FINAL_NORMS, type(spec).__name__, "stack")(spec)


def make_layer(spec: Any) -> nn.Module:
    """The layer module that a spec of any kind describes."""
    return lookup(LAYERS, type(spec).__name__, "layer")(spec)
