"""Multi-head and grouped-query attention over the residual stream or a memory, on PyTorch's fused kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.nn.caches import make_store
from layerwise.nn.caches.heavy import HeavyStore
from layerwise.nn.linear import make_linear
from layerwise.nn.norms import Gain
from layerwise.nn.positions import GridBias, rotate
from layerwise.stack.spec import LayerSpec

if TYPE_CHECKING:
    from layerwise.nn.cache import Slot
    from layerwise.stack.context import Context


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d) + bias) V, with as many key/value heads as `spec.kv_heads`; `spec.attention_scale` replaces 1/sqrt(d).

    With `spec.head_scale`, Concat(gamma_1 head_1, ..., gamma_h head_h) W_o (Shleifer et al. 2021, "NormFormer", section 2), or with
    `after`, as the authors' code has it, the factors on groups of W_o's output. Cross-attention has none, as there.

    Args:
        spec: a resolved layer spec.
        cross: keys and values come from `Context.memory` instead of the stream.
    """

    reads = ("q", "k", "v")
    writes = ("o",)

    def __init__(self, spec: LayerSpec, cross: bool = False) -> None:
        super().__init__()
        width, size, kv = spec.width, spec.head_dim, spec.kv_heads
        assert width and size and kv
        self.spec, self.cross, self.size = spec, cross, size
        self.scale = size**-0.5 if spec.attention_scale is None else spec.attention_scale
        role = "cross." if cross else ""
        self.q = make_linear(role + "q", width, spec.heads * size, spec.qkv_bias, spec)
        self.k = make_linear(role + "k", width, kv * size, spec.qkv_bias if spec.key_bias is None else spec.key_bias, spec)
        self.v = make_linear(role + "v", width, kv * size, spec.qkv_bias, spec)
        self.o = make_linear(role + "o", spec.heads * size, width, spec.out_bias, spec)
        self.q_norm = nn.RMSNorm(size, eps=spec.norm_eps) if spec.qk_norm else None
        self.k_norm = nn.RMSNorm(size, eps=spec.norm_eps) if spec.qk_norm else None
        self.head_scale = Gain(spec.heads) if spec.head_scale and not cross else None
        self.grid = GridBias(spec.heads, spec.grid) if spec.position == "grid" and spec.grid is not None else None

    def forward(self, x: Float[Tensor, "b s width"], ctx: Context, slot: Slot) -> Float[Tensor, "b s width"]:
        q = self.heads(self.q(x), self.q_norm)
        store: Any = None
        if self.cross:
            k, v = self._memory(ctx, slot)
            bias, causal = ctx.memory_bias(), False
        else:
            k, v = self.heads(self.k(x), self.k_norm), self.heads(self.v(x))
            if self.spec.position == "rotary":
                cos, sin = self.rotary(ctx, q.dtype)
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            keys = None
            if ctx.cache is not None:
                assert ctx.positions is not None
                if (kept := self.spec.cache) is None:
                    k, v, keys = ctx.cache.append(slot, k, v, ctx.positions)
                else:
                    store = ctx.cache.store(slot, lambda: make_store(kept))
                    k, v, keys = store.extend(self, x, k, v, ctx)
            bias, causal = ctx.bias(self.spec, q, keys, self.grid)
        recorded = ctx.recorder is not None and not self.cross and ctx.recorder.wants_attention(slot[0])
        if recorded or isinstance(store, HeavyStore):
            out = self._recorded(q, k, v, bias, causal, ctx, slot, store)
        else:
            dropout = self.spec.attention_dropout if self.training else 0.0
            grouped = k.shape[1] != q.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, bias, dropout, causal, scale=self.spec.attention_scale, enable_gqa=grouped)
        out = out.transpose(1, 2).flatten(2)
        if self.head_scale is None:
            return self.o(out)
        return self.o(self.head_scale(out)) if self.spec.head_scale == "before" else self.head_scale(self.o(out))

    def rotary(self, ctx: Context, dtype: torch.dtype, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosine and sine that turn this layer's heads, at the pass's positions or at others."""
        return ctx.rotary(self.spec.rotary_dim or self.size, self.spec.rope_theta, dtype, self.spec.rope_scaling, positions)

    def heads(self, x: Float[Tensor, "b s hd"], norm: nn.Module | None = None) -> Float[Tensor, "b h s d"]:
        x = x.unflatten(-1, (-1, self.size))
        return (x if norm is None else norm(x)).transpose(1, 2)

    def _memory(self, ctx: Context, slot: Slot) -> tuple[Tensor, Tensor]:
        """Keys and values of the memory, made once and kept in the cache if there is one."""
        pair = ctx.cache.recall(slot) if ctx.cache is not None else None
        if pair is None:
            if ctx.memory is None:
                raise ValueError("a cross-attention layer needs ctx.memory, the encoder's output")
            pair = self.heads(self.k(ctx.memory), self.k_norm), self.heads(self.v(ctx.memory))
            if ctx.cache is not None:
                ctx.cache.remember(slot, *pair)
        return pair

    def _recorded(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, ctx: Context, slot: Slot, store: Any) -> Tensor:
        """The same attention with its probabilities (b, h, s, keys) left in the recorder, and shown to a store that goes by them."""
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(-1, -2) * self.scale
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        elif bias is not None:
            scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
        probabilities = scores.softmax(dim=-1)
        if isinstance(store, HeavyStore):
            store.observe(probabilities.detach(), ctx)
        if ctx.recorder is not None and ctx.recorder.wants_attention(slot[0]):
            ctx.recorder.attention[slot[0]] = probabilities.detach() if ctx.recorder.detach else probabilities
        return F.dropout(probabilities, self.spec.attention_dropout, self.training) @ v
