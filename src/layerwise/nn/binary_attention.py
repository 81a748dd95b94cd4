"""Attention over one-bit queries, keys, values and probabilities, with low-rank estimates of what binarization leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import BadInput
from layerwise.nn.attention import Attention
from layerwise.nn.binarize import Elastic
from layerwise.stack.spec import LayerSpec

if TYPE_CHECKING:
    from layerwise.nn.cache import Slot
    from layerwise.stack.context import Context


class Estimators(nn.Module):
    """Full-precision projections of a layer's input X that stand in for the residuals Rq, Rk, Rv of binarization.

    Q K^T = Qb Kb^T + Qb Rk^T + Rq Kb^T + Rq Rk^T; the last three are estimated by E = qm kp^T + qp km^T + qp kp^T, shared by
    all heads, with qm, kp, qp, km the projections of X to `rank` numbers; Rv by one number a position.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.qm, self.qp, self.km, self.kp = (nn.Linear(width, rank) for _ in range(4))
        self.vp = nn.Linear(width, 1)

    def scores(self, x: Float[Tensor, "b s width"]) -> Float[Tensor, "b 1 s s"]:
        qm, qp, km, kp = self.qm(x), self.qp(x), self.km(x), self.kp(x)
        return (qm @ kp.mT + qp @ (km + kp).mT)[:, None]

    def values(self, x: Float[Tensor, "b s width"]) -> Float[Tensor, "b 1 s 1"]:
        return self.vp(x)[:, None]

    def initialize(self, std: float, generator: torch.Generator) -> None:
        for linear in (self.qm, self.qp, self.km, self.kp, self.vp):
            nn.init.normal_(linear.weight, std=std, generator=generator)
            nn.init.zeros_(linear.bias)


class BinaryAttention(Attention):
    """softmax((Qb Kb^T + E) / sqrt(d)), binarized to Ab; context Ab Vb + Ab vp(X). `spec.estimator_rank` 0 leaves the estimates out.

    Source: Xing et al. 2024, "BiPFT", section "Binarization residual polynomials" (arXiv 2312.08937).
    """

    def __init__(self, spec: LayerSpec, cross: bool = False) -> None:
        if cross or spec.causal or spec.kv_heads != spec.heads or spec.position not in ("none", "relative"):
            raise BadInput("binary-attention is an encoder's: it has no causal, cross, grouped or rotary form")
        super().__init__(spec)
        assert spec.width
        self.q_bits, self.k_bits, self.v_bits = Elastic(), Elastic(), Elastic()
        self.attention_bits = Elastic(signed=False)
        self.estimators = Estimators(spec.width, spec.estimator_rank) if spec.estimator_rank else None

    def forward(self, x: Float[Tensor, "b s width"], ctx: Context, slot: Slot) -> Float[Tensor, "b s width"]:
        q = self.heads(self.q(x), self.q_norm)
        k, v = self.heads(self.k(x), self.k_norm), self.heads(self.v(x))
        bias, _ = ctx.bias(self.spec, q, None, self.grid)
        scores = self.q_bits(q) @ self.k_bits(k).mT
        if self.estimators is not None:
            scores = scores + self.estimators.scores(x)
        scores = scores * self.scale
        if bias is not None:
            scores = scores.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else scores + bias
        attention = scores.softmax(dim=-1)
        if ctx.recorder is not None and ctx.recorder.wants_attention(slot[0]):
            ctx.recorder.attention[slot[0]] = attention.detach() if ctx.recorder.detach else attention
        attention = self.attention_bits(F.dropout(attention, self.spec.attention_dropout, self.training))
        values = self.v_bits(v)
        if self.estimators is not None:
            values = values + self.estimators.values(x)
        return self.o((attention @ values).transpose(1, 2).flatten(2))
