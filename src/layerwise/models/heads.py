"""What stands on top of a stack: vocabulary scores, classes, and the pooling under them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.models.spec import HeadSpec
from layerwise.nn.ffn import activation
from layerwise.nn.linear import LINEARS
from layerwise.nn.norms import fill_norm, make_norm
from layerwise.stack.parts_spec import LinearSpec
from layerwise.table import lookup


def pool(hidden: Tensor, how: str, mask: Tensor | None = None, prefix: int = 0, ends: Tensor | None = None) -> Tensor:
    """Reduce (b, s, width) over its real positions (mask (b, s), True: real), or (b, c, h, w) over space, to (b, width).

    Args:
        how: see `HeadSpec.pool` and `ModelSpec.pool`; `first_and_patches` and `distilled` give (b, 2 width).
        prefix: positions before an image's patches. ends: (b,) where each text ends.
    """
    if hidden.dim() == 4:
        return hidden.mean(dim=(2, 3))
    if hidden.dim() == 2:
        return hidden
    if how == "none":
        return hidden
    if how == "patches":
        return hidden[:, prefix:].mean(dim=1)
    if how == "first_and_patches":
        return torch.cat([hidden[:, 0], hidden[:, prefix:].mean(dim=1)], dim=-1)
    if how == "end":
        assert ends is not None, "only texts have an end"
        return hidden[torch.arange(len(hidden), device=hidden.device), ends]
    if how == "distilled":
        return hidden[:, :2].flatten(1)
    if how == "max":
        return (hidden if mask is None else hidden.masked_fill(~mask[..., None], -torch.inf)).amax(dim=1)
    if mask is None:
        return {"mean": lambda: hidden.mean(dim=1), "first": lambda: hidden[:, 0], "last": lambda: hidden[:, -1]}[how]()
    if how == "mean":
        weight = mask.to(hidden.dtype)[..., None]
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
    order = torch.arange(hidden.shape[1], device=hidden.device).expand(mask.shape)
    index = order.masked_fill(~mask, -1).argmax(dim=1) if how == "last" else mask.int().argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), index]


class LMHead(nn.Module):
    """Vocabulary scores for hidden vectors: (..., width) -> (..., vocab).

    `features` and `scores` are separate so that an objective can score only the positions that have a label, in chunks.
    When tied, the caller passes the token embedding's matrix and this module has none.
    """

    def __init__(self, spec: HeadSpec, width: int, vocab: int) -> None:
        super().__init__()
        self.spec = spec
        size = spec.size or width
        self.dense = nn.Linear(width, size) if spec.transform else None
        self.norm = make_norm(spec.norm, size, spec.norm_eps) if spec.transform else None
        self.weight = None if spec.tie else nn.Parameter(torch.empty(vocab, size))
        self.bias = nn.Parameter(torch.empty(vocab)) if spec.bias else None

    def features(self, hidden: Tensor) -> Tensor:
        """What the vocabulary matrix multiplies."""
        if self.spec.scale != 1.0:
            hidden = hidden * self.spec.scale
        if self.dense is None or self.norm is None or self.spec.transform is None:
            return hidden
        return self.norm(activation(self.spec.transform)(self.dense(hidden)))

    def matrix(self, tied: Tensor) -> Tensor:
        """The vocabulary matrix (vocab, width)."""
        return tied if self.weight is None else self.weight

    def forward(self, hidden: Tensor, tied: Tensor) -> Tensor:
        return F.linear(self.features(hidden), self.matrix(tied), self.bias)

    def initialize(self, std: float, generator: torch.Generator) -> None:
        if self.dense is not None and self.norm is not None:
            nn.init.normal_(self.dense.weight, std=std, generator=generator)
            nn.init.zeros_(self.dense.bias)
            fill_norm(self.norm, 1.0)
        if self.weight is not None:
            nn.init.normal_(self.weight, std=std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Pooler(nn.Module):
    """tanh(W h + b) with a dense matrix, as in BERT; tanh(norm(W h + b) + h) with a one-bit one, as in BiPFT: (b, width) -> (b, width)."""

    def __init__(self, kind: str, width: int, eps: float) -> None:
        super().__init__()
        self.dense = lookup(LINEARS, kind, "linear")(width, width, True, LinearSpec(kind))
        self.norm = None if kind == "dense" else make_norm("layernorm", width, eps)

    def forward(self, pooled: Tensor) -> Tensor:
        made = self.dense(pooled)
        return torch.tanh(made if self.norm is None else self.norm(made) + pooled)

    def initialize(self, std: float, generator: torch.Generator) -> None:
        self.dense.initialize(std, generator)
        if self.norm is not None:
            fill_norm(self.norm, 1.0)


class ClassifierHead(nn.Module):
    """Class scores for the pooled input, (b, width) -> (b, classes), or for every position, (b, s, width) -> (b, s, classes), or a vector of it, (b, width) -> (b, size)."""

    def __init__(self, spec: HeadSpec, width: int) -> None:
        super().__init__()
        outer = spec.size if spec.kind == "projection" else spec.classes
        assert outer, "the number of classes is filled in before a model is built"
        self.spec = spec
        self.dropout = nn.Dropout(spec.dropout)
        self.pooler = Pooler(spec.pooler, width, spec.norm_eps) if spec.pooler is not None else None
        self.norm = make_norm(spec.pool_norm, width, spec.norm_eps) if spec.pool_norm is not None else None
        inner = 2 * width if spec.pool == "first_and_patches" else width
        self.project = nn.Linear(inner, spec.size) if spec.kind == "classifier" and spec.size is not None else None
        self.out = nn.Linear(inner if self.project is None else self.project.out_features, outer, bias=spec.bias)
        self.distilled = nn.Linear(width, outer, bias=spec.bias) if spec.pool == "distilled" else None

    def forward(self, pooled: Tensor) -> Tensor:
        if self.distilled is not None:  # the mean of both, as at inference in Touvron et al. 2021, "DeiT", section 4
            first, second = self.dropout(pooled).chunk(2, dim=-1)
            return (self.out(first) + self.distilled(second)) / 2
        pooled = pooled if self.norm is None else self.norm(pooled)
        pooled = self.dropout(pooled if self.pooler is None else self.pooler(pooled))
        return self.out(pooled if self.project is None else self.project(pooled))

    def initialize(self, std: float | None, generator: torch.Generator) -> None:
        """Normal weights with the stack's standard deviation; Xavier's (Glorot and Bengio 2010) where it has none."""
        if self.pooler is not None:
            self.pooler.initialize((1 / self.out.in_features) ** 0.5 if std is None else std, generator)
        for linear in (self.project, self.out, self.distilled):
            if linear is None:
                continue
            xavier = (2 / sum(linear.weight.shape)) ** 0.5
            nn.init.normal_(linear.weight, std=xavier if std is None else std, generator=generator)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.norm is not None:
            fill_norm(self.norm, 1.0)
