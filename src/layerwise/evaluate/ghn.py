"""What networks that a graph hypernetwork has not seen are worth with its weights, and after a little training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.analyze.findings import Findings, Table
from layerwise.data.order import Order
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference
from layerwise.models.architectures import distinct
from layerwise.models.ghn import predict, with_noise
from layerwise.models.model import build
from layerwise.models.spec import ModelSpec
from layerwise.models.targets import Target, target_of
from layerwise.objectives.ghn import training_pool

UNSEEN = 1_000_003
"""Seeds of the measured architectures begin there, far from those of the pool."""


def ghn_start(
    model: Any,
    data: Any,
    *,
    start: Literal["predicted", "random"] = "predicted",
    nets: int = 20,
    rates: tuple[float, ...] = (0.2, 0.05, 0.0125),
    steps: int = 50,
    batch: int = 64,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    noise: float = 1e-5,
    pool: int = 500,
    pool_seed: int = 0,
    others: bool = True,
    batches_at_most: int | None = 4,
    seed: int | None = None,
) -> Findings:
    """Accuracy of unseen architectures as they start, and after some steps of SGD.

    Each network is trained with each of `rates` and counts with the one that is best on every second batch of the validation split; its
    accuracy is measured on the other batches, so that both starts have their rates chosen alike. A network that diverges counts with the
    accuracy it has. Batch norms use the batch's statistics throughout.

    Metrics: `untrained` and `accuracy`, means over `nets` architectures of the distribution that the hypernetwork was trained on; `rate`,
    the geometric mean of the chosen ones; `largest_rate_accuracy` and `smallest_rate_accuracy`, with that rate for all; and where
    `others`, `others_untrained` and `others_accuracy`, of networks outside that distribution, in plain PyTorch: deeper, wider, with
    linear layers.

    Args:
        start: weights predicted by the model, or He's random ones.
        noise: on predicted weights, see `layerwise.models.ghn.with_noise`.
        pool, pool_seed: those of training; none of these architectures is measured.
        batches_at_most: validation batches of 256 images, at least 2.
    """
    check_start(model.spec, rates=rates, nets=nets)
    embedding, head = model.spec.embedding, model.spec.head
    options = {"channels": embedding.channels, "size": embedding.size, "classes": head.classes}
    known = set(training_pool(model, pool, pool_seed))
    specs = distinct(nets, torch.Generator().manual_seed(UNSEEN + (seed or 0)), but=known, **options)
    strange = dict(outsiders(**options)) if others else {}
    named = {f"sampled {i}": target_of(spec) for i, spec in enumerate(specs)}
    example = torch.empty(2, embedding.channels, *embedding.size, device="meta")
    named |= {name: Target.of(network, example) for name, network in strange.items()}
    starts: dict[str, dict[str, Tensor]] = {}
    generator = torch.Generator().manual_seed(seed or 0)
    for i, (name, target) in enumerate(named.items()):
        if start == "predicted":
            with inference(model):
                starts[name] = with_noise(predict(model, [target.graph])[0], noise, generator)
        else:
            starts[name] = _random(specs[i] if i < len(specs) else strange[name], (seed or 0) * 1000 + i, model.device)
    rows = list(batches(data.validation, 256, batches_at_most, model.device))
    choosing, measuring = rows[::2], rows[1::2] or rows
    table: list[list[Any]] = []
    for name, target in named.items():
        fits = [_fitted(target, starts[name], data, rate, steps, batch, momentum, weight_decay, seed or 0) for rate in rates]
        seen = [_accuracy(target, weights, choosing) for weights in fits]
        best = max(range(len(rates)), key=seen.__getitem__)
        measured = [_accuracy(target, weights, measuring) for weights in fits]
        table.append([name, len(target.graph.nodes), _accuracy(target, starts[name], measuring), measured[best], rates[best], *measured])
    found = {"untrained": _mean(table[:nets], 2), "accuracy": _mean(table[:nets], 3)}
    found["rate"] = math.exp(sum(math.log(row[4]) for row in table[:nets]) / nets)
    for name, rate in (("largest", max(rates)), ("smallest", min(rates))):
        found[f"{name}_rate_accuracy"] = _mean(table[:nets], 5 + rates.index(rate))
    if others:
        found |= {"others_untrained": _mean(table[nets:], 2), "others_accuracy": _mean(table[nets:], 3)}
    columns = ["network", "nodes", "untrained", f"after {steps} steps", "rate", *(f"at rate {rate:g}" for rate in rates)]
    return Findings(found, [Table("Networks", columns, table)])


def check_start(spec: ModelSpec, *, rates: Sequence[float], nets: int, **_: Any) -> None:
    """Raises BadInput: no rates or one that is not positive, or no networks."""
    if not rates or min(rates) <= 0 or nets < 1:
        raise BadInput(f"rates are some positive learning rates and nets is at least 1; got {rates} and {nets}")


def outsiders(*, channels: int, size: tuple[int, int], classes: int) -> dict[str, nn.Module]:
    """Networks in plain PyTorch that the sampler does not make."""

    def block(inner: int, outer: int, stride: int = 1, norm: bool = True) -> list[nn.Module]:
        return [
            nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=not norm),
            nn.BatchNorm2d(outer) if norm else nn.Identity(),
            nn.ReLU(),
        ]

    def end(width: int) -> list[nn.Module]:
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]

    first = 2 if min(size) > 16 else 1
    deep = [layer for i in range(11) for layer in block(16, 16)]
    cells = math.prod(-(-n // (2 * first)) for n in size)
    return {
        "12 layers with norms": nn.Sequential(*block(channels, 16, first), *deep, *end(16)),
        "12 layers without norms": nn.Sequential(
            *block(channels, 16, first, False), *[m for _ in range(11) for m in block(16, 16, 1, False)], *end(16)
        ),
        "twice as wide": nn.Sequential(*block(channels, 32, first), *block(32, 64, 2), *block(64, 64), *end(64)),
        "two linear layers": nn.Sequential(
            *block(channels, 16, first, False),
            *block(16, 16, 2, False),
            nn.Flatten(),
            nn.Linear(16 * cells, 64),
            nn.ReLU(),
            nn.Linear(64, classes),
        ),
    }


def _mean(rows: Sequence[Sequence[Any]], column: int) -> float:
    return sum(row[column] for row in rows) / max(len(rows), 1)


def _random(spec_or_network: Any, seed: int, device: torch.device) -> dict[str, Tensor]:
    """He-normal weights, of a description or of a plain network."""
    if not isinstance(spec_or_network, nn.Module):
        return {name: p.detach() for name, p in build(spec_or_network, seed).to(device).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, p in spec_or_network.named_parameters():
        gain = p.dim() == 1 and name.endswith("weight")
        made[name] = (
            torch.randn(p.shape, generator=generator) * (2 / p[0].numel()) ** 0.5 if p.dim() > 1 else torch.full_like(p, float(gain))
        )
    return {name: p.detach().to(device) for name, p in made.items()}


def _fitted(
    target: Target, start: dict[str, Tensor], data: Any, rate: float, steps: int, batch: int, momentum: float, decay: float, seed: int
) -> dict[str, Tensor]:
    """The weights after some steps of SGD at a constant rate."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    optimizer = torch.optim.SGD(list(weights.values()), lr=rate, momentum=momentum, weight_decay=decay)
    order = Order(len(data.train), batch, seed)
    device = next(iter(weights.values())).device
    target.network.train()
    for step in range(steps):
        rows = {name: value.to(device) for name, value in data.train.batch(order.indices(step)).items()}
        optimizer.zero_grad()
        F.cross_entropy(target(weights, rows), rows["labels"]).backward()
        optimizer.step()
    return {name: p.detach() for name, p in weights.items()}


@torch.no_grad()
def _accuracy(target: Target, weights: dict[str, Tensor], rows: Sequence[dict[str, Tensor]]) -> float:
    right = sum((target(weights, batch).argmax(dim=1) == batch["labels"]).sum().item() for batch in rows)
    return right / sum(len(batch["labels"]) for batch in rows)
