"""A language model whose routers learn to skip the feed-forward of tokens that it hardly changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.errors import BadInput
from layerwise.models.spec import ModelSpec
from layerwise.nn.token_router import ROUTING, Routing, token_routed
from layerwise.objectives.language import next_tokens, score_labels
from layerwise.objectives.loss import Loss
from layerwise.objectives.objective import Objective

Labels = Literal["cos-global", "cos", "self", "random"]


class TokenRouterLM(Objective):
    """J = CE + weight x BCE(router logits, labels); label 1: the token's feed-forward is worth running.

    In training the tokens of the batch with the largest logits are active, a share c_l of layer l's; in validation a token is active by
    the sign of its logit, as when the model is used, so the two rates differ and both are reported. The labels follow from u = cos(h, h +
    MLP(N h)) in float32, without gradient and for all tokens, which is why training is no cheaper: small u, much change, label 1.

    `cos-global`: the smallest u of all layers together, a share `capacity` of them; c_l becomes the share of ones in layer l, for the next
    step. `cos`: the smallest u of each layer, c_l = capacity. `self`: the tokens that were active. `random`: a control, in which active
    tokens are drawn and routers learn from CE alone. The average capacity falls linearly from 1 during `anneal`; c_l are rescaled with it.

    Source: Tan et al. 2024, "DLO: Dynamic Layer Operation for Efficient Vertical Scaling of LLMs" (arXiv 2407.11030), and its published code,
    with logits in place of probabilities in BCE.

    Args:
        capacity: rho, average share of active tokens. weight: a. anneal: steps (or, below 1, share of all steps) until `capacity` is reached.
    """

    one_process = True

    def __init__(
        self, data: Any = None, *, capacity: float = 0.9, labels: Labels = "cos-global", weight: float = 1.0, anneal: float = 1000
    ) -> None:
        super().__init__()
        if not 0 < capacity <= 1 or weight < 0 or anneal < 0:
            raise BadInput(f"capacity lies in (0, 1], weight and anneal are >= 0; got {capacity}, {weight} and {anneal}")
        self.capacity, self.labels, self.weight, self.anneal = capacity, labels, weight, anneal
        self.routed: list[int] = []
        self.now, self._micro = 1.0, 0
        self.shares: Tensor
        self.coming: Tensor
        self.register_buffer("shares", torch.ones(0))
        self.register_buffer("coming", torch.ones(0))

    @staticmethod
    def check(spec: ModelSpec) -> None:
        """Raises BadInput: the model has no routers of tokens."""
        token_routed(spec, "token-router-lm")

    def attach(self, model: Any, batch: Mapping[str, Any]) -> None:
        self.routed = token_routed(model.spec, "token-router-lm")
        self.shares = torch.ones(len(self.routed), dtype=torch.float64, device=model.device)
        self.coming = self.shares.clone()

    def before_step(self, step: int, total: int, divisor: float | None) -> None:
        steps = self.anneal if self.anneal >= 1 else round(self.anneal * total)
        self.now, self._micro = annealed(self.capacity, steps, step), 0
        self.shares.copy_(self.coming)
        if step <= steps:
            self.shares.mul_(self.now / self.shares.mean()).clamp_(max=1.0)
        if self.labels != "cos-global":
            self.coming.copy_(self.shares)

    def capacities(self) -> dict[int, float]:
        """Layer -> c_l, the share of its tokens that are active in this step."""
        return dict(zip(self.routed, self.shares.tolist(), strict=True))

    def forward(self, model: Any, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        if not torch.is_grad_enabled():
            return score_labels(model, model(batch, **context).hidden[:, :-1], next_tokens(batch))
        routing = ByCapacity(self.capacities(), generator if self.labels == "random" else None)
        out = model(batch, extras={ROUTING: routing}, **context)
        loss = score_labels(out.model, out.hidden[:, :-1], next_tokens(batch))
        seen = [routing.seen[i] for i in sorted(routing.seen)]
        active = [layer.active for layer in seen]
        metrics = {"lm_loss": loss.total.detach(), "active": torch.cat(active).double().mean() * loss.count}
        if self.labels == "random" or not seen:
            return Loss(loss.total, loss.count, metrics)
        similar = [layer.similarity for layer in seen]
        labels = active if self.labels == "self" else least(similar, self.now, together=self.labels == "cos-global")
        if self.labels == "cos-global":
            self._remember(sorted(routing.seen), labels)
        routers = F.binary_cross_entropy_with_logits(torch.cat([layer.logits for layer in seen]).float(), torch.cat(labels).float())
        metrics["router_loss"] = routers.detach() * loss.count
        return Loss(loss.total + self.weight * loss.count * routers, loss.count, metrics)

    def _remember(self, layers: list[int], labels: list[Tensor]) -> None:
        """The share of ones in each layer, for the next step: the mean over this step's micro-batches."""
        self._micro += 1
        for i, ones in zip(layers, labels, strict=True):
            at = self.routed.index(i)
            self.coming[at] += (ones.double().mean() - self.coming[at]) / self._micro

    def finish(self, model: Any, data: Any) -> Findings:
        """Where the capacity went, which the routers keep."""
        for i, share in self.capacities().items():
            model.stack.layers[i].router.capacity.fill_(share)
        rows: list[list[Cell]] = [[i, c, int(model.stack.layers[i].spec.added)] for i, c in self.capacities().items()]
        return Findings(tables=[Table("Share of tokens that were active in training", ["layer", "capacity", "added"], rows)])


@dataclass
class Seen:
    """What one layer did in one pass, for its real tokens: (n,) logits, which were active, and cos(h, h + MLP(N h))."""

    logits: Tensor
    active: Tensor
    similarity: Tensor


class ByCapacity(Routing):
    """Training's choice: in each layer the tokens with the largest logits of the whole batch (ties all; one at least), or drawn ones.

    It looks at other tokens, also later ones, so it is not for use.
    """

    dense = True

    def __init__(self, capacities: Mapping[int, float], generator: torch.Generator | None = None) -> None:
        self.capacities, self.generator = capacities, generator
        self.seen: dict[int, Seen] = {}
        self._drawn: dict[int, Tensor] = {}

    def choose(self, layer: int, logits: Float[Tensor, "b s"], real: Bool[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
        if self.generator is not None:
            if layer not in self._drawn:  # what is computed again in the backward pass is to be the same
                self._drawn[layer] = torch.rand(logits.shape, generator=self.generator, device=logits.device)
            logits = self._drawn[layer]
        among = logits[real]
        return real & (logits >= among.topk(quota(self.capacities[layer], len(among))).values[-1]) if len(among) else real

    def see(self, layer: int, logits: Tensor, stream: Tensor, change: Tensor, active: Tensor, real: Tensor) -> None:
        with torch.no_grad():
            similarity = F.cosine_similarity(stream.float(), (stream + change).float(), dim=-1)
        seen = Seen(logits[real], active[real], similarity[real])
        # A layer that is computed again in the backward pass does the same again, and what it did first counts.
        if len(seen.active):
            self.seen.setdefault(layer, seen)


def quota(share: float, count: int) -> int:
    """ceil(share x count), one at least; a share that is a whole number but for rounding is that number."""
    return min(count, max(1, math.ceil(share * count - 1e-9)))


def least(similarity: Sequence[Float[Tensor, " n"]], share: float, *, together: bool) -> list[Bool[Tensor, " n"]]:
    """Which are among the `quota` smallest (ties with the last of them too), of all layers together or of each."""
    if not together:
        return [s <= s.topk(quota(share, len(s)), largest=False).values[-1] for s in similarity]
    among = torch.cat(list(similarity))
    bound = among.topk(quota(share, len(among)), largest=False).values[-1]
    return [s <= bound for s in similarity]


def annealed(capacity: float, steps: float, step: int) -> float:
    """The average capacity at a step: linearly from 1 at step 0 to `capacity` at step `steps`, and from then on."""
    return capacity if step >= steps else 1 - (1 - capacity) * step / steps
