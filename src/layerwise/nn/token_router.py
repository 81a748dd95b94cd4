"""Deciding token by token whether a layer's feed-forward runs.

With logit r of a token, y = h + s MLP(N h), s = 1 + gap (sigmoid(r) - 1/2), where the token is active, and y = h where it is not; h is the
stream behind attention, which runs for every token, so keys and values are those of the whole model. A token is active where r >= 0: a rule
that looks at nothing but the token, so decoding with a cache and without agree. (A router of zeros has all tokens active. The published
code asks for sigmoid(r) > 1/2, by which an untrained router skips everything.) Training chooses otherwise, see `Routing`.

Source: Tan et al. 2024, "DLO: Dynamic Layer Operation for Efficient Vertical Scaling of LLMs" (arXiv 2407.11030), and its published code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.nn.routers import Router
from layerwise.stack.parts_spec import RouterSpec

if TYPE_CHECKING:
    from layerwise.stack.context import Context

ROUTING = "routing"
"""The entry of `Context.extras` that holds a `Routing`."""


class Routing:
    """Who chooses the active tokens of a pass: this one by the sign of the logit; others may count, or choose by rank.

    Attributes:
        dense: the feed-forward is to run on all tokens, and `see` is shown what it makes.
    """

    dense = False

    def choose(self, layer: int, logits: Float[Tensor, "b s"], real: Bool[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
        """Which tokens are active; those that are not `real` (padding) never are."""
        return real & (logits >= 0)

    def see(self, layer: int, logits: Tensor, stream: Tensor, change: Tensor, active: Tensor, real: Tensor) -> None:
        """What went into the feed-forward's norm, (b, s, width), and what the feed-forward makes of it."""


BY_SIGN = Routing()


def token_routed(spec: Any, what: str) -> list[int]:
    """The layers of a model's description whose router decides token by token.

    Raises:
        BadInput: there is none, so `what` has nothing to work on.
    """
    found = [i for i, layer in enumerate(spec.stack.layers) if getattr(layer, "router", None) is not None and layer.router.decides == "ffn"]
    if not found:
        raise BadInput(f"{what} needs a model with routers of tokens: put some in first (edit: route-tokens)")
    return found


class TokenRouter(Router):
    """The feed-forward runs on active tokens only; the others pass unchanged and cost nothing.

    Attributes:
        capacity: share of tokens that were active when training ended; 1 before. No pass reads it, calibration may.
    """

    capacity: Tensor

    def __init__(self, width: int, spec: RouterSpec) -> None:
        super().__init__(width, spec)
        self.gap = spec.gap
        self.register_buffer("capacity", torch.ones(()))

    def initialize(self) -> None:
        super().initialize()
        torch.nn.init.ones_(self.capacity)

    def routed(
        self, entered: Float[Tensor, "b s width"], x: Float[Tensor, "b s width"], ffn: Any, ctx: Context, layer: int
    ) -> Float[Tensor, "b s width"]:
        """The stream behind the feed-forward branch `ffn`.

        Args:
            entered: the stream as it entered the layer, which the router reads. x: as it enters the feed-forward.
        """
        assert ctx.positions is not None
        logits = self(entered)
        real = (ctx.positions >= 0).expand(x.shape[:2])
        routing = ctx.extras.get(ROUTING, BY_SIGN)
        active = routing.choose(layer, logits.detach(), real)
        factor = 1 + self.gap * (logits.sigmoid() - 0.5)
        if routing.dense:
            change = ffn.change(x)
            routing.see(layer, logits, x, change, active, real)
            return x + torch.where(active[..., None], factor[..., None] * change, 0.0).to(x.dtype)
        flat = x.flatten(0, 1)
        index = active.flatten().nonzero().squeeze(1)
        change = ffn.change(flat[index]) * factor.flatten()[index, None]
        return flat.index_add(0, index, change.to(x.dtype)).view_as(x)
