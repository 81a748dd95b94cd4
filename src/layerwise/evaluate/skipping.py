"""What a model with routers loses and saves: how many tokens each feed-forward really runs for, and what that costs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layerwise.analyze.cost import Operations
from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.nn.token_router import ROUTING, Routing, token_routed
from layerwise.objectives.language import CausalLM
from layerwise.objectives.token_routing import quota

Active = Literal["router", "random", "all"]
Calibrate = Literal["global", "layer"]


def token_routing(
    model: Model,
    data: Any,
    *,
    active: Active = "router",
    share: float | None = None,
    calibrate: Calibrate = "global",
    samples: int = 64,
    split: str = "validation",
    batch: int = 16,
    batches_at_most: int | None = None,
    seed: int | None = None,
) -> Findings:
    """Next-token prediction on a split with feed-forwards skipped, and the operations that really ran.

    Metrics: `val_loss` (nats a token), `perplexity`; `active_share` of real tokens, measured, over all layers with a router;
    `flops_per_token` of the forward pass, counted while it runs, logits included; `flops_share` and `ffn_share`: of what the pass, and its
    feed-forwards with a router, would cost if every token (padding too) were active; `tokens_per_second`. A table has the layers.

    Args:
        active: tokens whose feed-forward runs: the router's choice, as in generation; as many drawn at random; or all.
        share: of active tokens. For the router, its threshold is moved, the same for all layers, to where on `samples` training rows at
            most this share is active, and stays there: a token's decision still looks at nothing but itself. None: the threshold is 0. Random
            choices need one.
        calibrate: `layer` gives every layer a threshold of its own instead, at which on those rows it is as active as in training, where the
            tokens of a batch with the largest logits were. It takes no share.
        seed: of random choices.

    Raises:
        BadInput: the model has no routers, or `random` has no share.
    """
    check_routing(model.spec, active=active, share=share, calibrate=calibrate)
    routed = token_routed(model.spec, "token-routing")
    with inference(model):
        generator = torch.Generator(device=model.device).manual_seed(seed or 0)
        routing = Counting(0.0)
        if active == "random":
            routing = Drawn(share or 0.0, generator)
        elif active == "all":
            routing = Counting(-math.inf)
        elif calibrate == "layer":
            routing = Counting(thresholds(model, data, samples))
        elif share is not None:
            routing = Counting(threshold(model, data, share, samples, batch))
        loss = torch.zeros((), dtype=torch.float64, device=model.device)
        count = tokens = operations = 0
        for rows in batches(split_of(data, split), batch, batches_at_most, model.device):
            with Operations() as counter:
                made = CausalLM()(model, rows, extras={ROUTING: routing})
            loss += made.total
            count += int(made.count)
            tokens += rows["input_ids"].numel()
            operations += counter.total
        began = time.perf_counter()
        _ = model(rows, extras={ROUTING: routing.uncounted()}).hidden.sum().item()  # the sum waits for the device
        seconds = time.perf_counter() - began
        each = {i: _ffn_operations(model, i) for i in routed}
    skipped = sum(each[i] * (tokens - int(routing.active[i])) for i in routed)
    whole = sum(each.values()) * tokens
    ran = sum(int(a) for a in routing.active.values())
    real = sum(routing.real.values())
    mean = loss.item() / count
    layers: list[list[Cell]] = [[i, int(routing.active[i]) / routing.real[i], int(model.stack.layers[i].spec.added)] for i in routed]
    return Findings(
        {
            "val_loss": mean,
            "perplexity": math.exp(min(mean, 700)),
            "active_share": ran / real,
            "flops_per_token": operations / tokens,
            "flops_share": operations / (operations + skipped),
            "ffn_share": 1 - skipped / whole,
            "tokens_per_second": rows["input_ids"].numel() / seconds,
        },
        [Table("Share of active tokens", ["layer", "active", "added"], layers)],
    )


def check_routing(spec: ModelSpec, *, active: Active, share: float | None, calibrate: Calibrate, **_: Any) -> None:
    """Raises BadInput: no routers of tokens, or a share where none belongs, or none where one does."""
    token_routed(spec, "token-routing")
    if (active == "random") != (share is not None) and active != "router":
        raise BadInput("random choices need a share of active tokens, and active: all has none")
    if calibrate == "layer" and (active != "router" or share is not None):
        raise BadInput("calibrate: layer takes the share of each layer from training: leave share out, and active: router")
    if share is not None and not 0 < share < 1:
        raise BadInput(f"share lies between 0 and 1; it is {share}")


def threshold(model: Model, data: Any, share: float, samples: int, batch: int) -> float:
    """The lowest threshold, one for all layers, at which no more than a share of the tokens of training rows is active.

    Who is active in lower layers moves the logits of upper ones, so it is found by bisection over whole passes.
    """
    rows = list(batches(split_of(data, "train"), batch, -(-samples // batch), model.device))

    def passed(cut: float) -> Counting:
        seen = Counting(cut, keep=True)
        for some in rows:
            _ = model(some, extras={ROUTING: seen}).hidden
        return seen

    logits = torch.cat(passed(-math.inf).logits + passed(math.inf).logits)
    low, high = logits.min().item(), logits.max().item()
    for _ in range(14):
        cut = (low + high) / 2
        seen = passed(cut)
        active = sum(int(a) for a in seen.active.values()) / sum(seen.real.values())
        low, high = (cut, high) if active > share else (low, cut)
    return high


def thresholds(model: Model, data: Any, samples: int) -> dict[int, float]:
    """For each layer the logit from which on its tokens are active, so that on training rows as many are as when training ended.

    Layers below have their thresholds already when a layer's is found. One whose tokens were all active keeps them all.
    """
    ranked = Ranked({i: float(model.stack.layers[i].router.capacity) for i in token_routed(model.spec, "token-routing")})
    for rows in batches(split_of(data, "train"), samples, 1, model.device):
        _ = model(rows, extras={ROUTING: ranked}).hidden
    return ranked.cuts


class Ranked(Routing):
    """The tokens of a pass with the largest logits are active, a share of each layer; the least of them is kept."""

    def __init__(self, shares: Mapping[int, float]) -> None:
        self.shares = shares
        self.cuts: dict[int, float] = {}

    def choose(self, layer: int, logits: Float[Tensor, "b s"], real: Bool[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
        among = logits[real]
        count = quota(self.shares[layer], len(among))
        self.cuts[layer] = -math.inf if count == len(among) else among.topk(count).values[-1].item()
        return real & (logits >= self.cuts[layer])


class Counting(Routing):
    """Tokens whose logit reaches a threshold, one for all layers or each layer's, are active, and are counted."""

    def __init__(self, cut: float | Mapping[int, float], *, keep: bool = False) -> None:
        self.cut, self.keep = cut, keep
        self.active: dict[int, Tensor | int] = {}
        self.real: dict[int, int] = {}
        self.logits: list[Tensor] = []

    def choose(self, layer: int, logits: Float[Tensor, "b s"], real: Bool[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
        chosen = real & self._wanted(layer, logits)
        self.active[layer] = self.active.get(layer, 0) + chosen.sum()
        self.real[layer] = self.real.get(layer, 0) + int(real.sum())
        if self.keep:
            self.logits.append(logits[real].float())
        return chosen

    def _wanted(self, layer: int, logits: Tensor) -> Tensor:
        return logits >= (self.cut[layer] if isinstance(self.cut, Mapping) else self.cut)

    def uncounted(self) -> Counting:
        """The same rule, with counts of its own."""
        return Counting(self.cut)


class Drawn(Counting):
    """Each token is active with one probability, whatever its logit."""

    def __init__(self, share: float, generator: torch.Generator) -> None:
        super().__init__(0.0)
        self.share, self.generator = share, generator

    def _wanted(self, layer: int, logits: Tensor) -> Tensor:
        return torch.rand(logits.shape, generator=self.generator, device=logits.device) < self.share

    def uncounted(self) -> Counting:
        return Drawn(self.share, self.generator)


def _ffn_operations(model: Model, i: int) -> int:
    """Operations of one token in a layer's feed-forward, counted as they run."""
    ffn = model.stack.layers[i].ffn
    with Operations() as counter:
        ffn.change(torch.zeros(1, model.stack.spec.width, device=model.device, dtype=next(ffn.parameters()).dtype))
    return counter.total
