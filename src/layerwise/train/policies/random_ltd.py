"""Middle layers see a random part of the tokens, drawn anew for every layer and sample, growing to all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.analyze.findings import Findings
from layerwise.errors import BadInput
from layerwise.stack.context import Call, Context
from layerwise.stack.spec import indices
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class RandomLTD(Policy):
    """Random layerwise token dropping.

    Source: Yao et al. 2022, "Random-LTD", sections 3.1-3.3 (arXiv 2211.11586), and the published DeepSpeed code.

    Args:
        layers: that drop tokens (None: all but the first and the last).
        keep: tokens a layer sees at the beginning. increment: the number kept is rounded down to a multiple of it.
        full_at: share of the steps after which all tokens are seen (T_r); 0 keeps `keep` tokens throughout.
        same: one subset for all layers of a sample, which is TokenBypass.
        token_clock: the learning rate's schedule counts layer-tokens that were seen and not steps.
    """

    def __init__(
        self,
        *,
        layers: Sequence[str | int] | None = None,
        keep: int = 64,
        increment: int = 8,
        full_at: float = 0.75,
        same: bool = False,
        token_clock: bool = True,
    ) -> None:
        if keep < 1 or increment < 1 or not 0 <= full_at <= 1:
            raise BadInput(f"random-ltd needs keep >= 1, increment >= 1 and full_at in [0, 1]; got {keep}, {increment} and {full_at}")
        self.keys, self.keep, self.increment, self.full_at = layers, keep, increment, full_at
        self.same, self.token_clock = same, token_clock
        self.layers: list[int] = []
        self.around = (self.through,)
        self._generator: torch.Generator | None = None
        self._drawn: Tensor | None = None
        self._kept = self._length = 0
        self._consumed: list[int] = []

    def start(self, run: Run) -> None:
        depth = run.model.stack.depth
        chosen = range(1, depth - 1) if self.keys is None else {i for key in self.keys for i in indices(key, depth)}
        self.layers = sorted(chosen)
        if not self.layers:
            raise BadInput(f"random-ltd has no layer to drop tokens in: a stack of {depth} layers has no middle; name layers")
        self._length = max(getattr(run.data.train, "tokens_per_row", 0) or 0, 0)
        if self._length and self.keep > self._length:
            raise BadInput(f"random-ltd keeps {self.keep} tokens of rows that have {self._length}")
        self._generator = torch.Generator(device=run.device)
        if self._length:
            costs = (self.layer_tokens(t, run.total, self._length, depth) for t in range(run.total))
            self._whole = self._length * depth * run.total
            self._consumed = list(itertools.accumulate(costs, initial=0))

    def kept(self, step: int, total: int, length: int) -> int:
        """r_t, the tokens that a dropping layer sees at a step, of `length`: never falling, a multiple of `increment` until it is all."""
        whole = self.full_at * total
        if self.full_at and step >= whole:
            return length
        r = self.keep if not self.full_at else int(step / whole * (length - self.keep) + self.keep)
        return min(max(r // self.increment * self.increment, 1), length)

    def layer_tokens(self, step: int, total: int, length: int, depth: int) -> int:
        """Tokens that all layers see of one sample at a step: r_t in those that drop, all in the others."""
        return self.kept(step, total, length) * len(self.layers) + length * (depth - len(self.layers))

    def before_step(self, run: Run) -> None:
        assert self._generator is not None
        # Of its own seed: what a step drops does not depend on how much randomness its layers use, nor on the process.
        self._generator.manual_seed((run.seed * 1_000_003 + run.step) ^ 0x5DEECE66D)
        self._drawn = None
        self._kept = self.kept(run.step, run.total, self._length) if self._length else self.keep
        if self.token_clock and self._consumed:
            run.clock = self._consumed[run.step] / self._consumed[-1] * run.total

    def through(self, i: int, layer: Any, x: Float[Tensor, "b s width"], ctx: Context, call: Call) -> Tensor:
        """The layer on its own subset of positions; the others pass unchanged."""
        if i not in self.layers or not layer.training or self._kept >= x.shape[1]:
            return call(x, ctx)
        tokens = self._subset(i, x.shape[0], x.shape[1])
        index = tokens[..., None].expand(-1, -1, x.shape[2])
        return x.scatter(1, index, call(x.gather(1, index), ctx.select(tokens, ordered=getattr(layer.spec, "window", None) is None)))

    def _subset(self, i: int, rows: int, length: int) -> Int[Tensor, "b r"]:
        """Sorted positions, distinct in each row; all layers' are drawn at once, at the first that asks in a pass."""
        position = 0 if self.same else self.layers.index(i)
        if self._drawn is None or self._drawn.shape[1] != rows or i == self.layers[0]:
            assert self._generator is not None
            sets = 1 if self.same else len(self.layers)
            noise = torch.rand(sets, rows, length, generator=self._generator, device=self._generator.device)
            self._drawn = noise.topk(self._kept, dim=2).indices.sort(dim=2).values
        return self._drawn[position]

    def findings(self) -> Findings:
        """The share of the layer-tokens that no dropping would have cost; the policy `layer-cost`, named after this one, counts them."""
        return Findings({"layer_token_share": self._consumed[-1] / self._whole} if self._consumed else {})
