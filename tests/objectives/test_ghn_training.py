"""Training a graph hypernetwork on drawn architectures, and what it gives unseen ones."""

import random

import torch
from torch.nn import functional as F

from layerwise.models.ghn import predict
from layerwise.models.model import build
from layerwise.models.spec import model_spec
from layerwise.models.targets import target_of
from layerwise.objectives.ghn import GraphHyperNetwork


def _ghn():
    spec = {
        "embedding": {"kind": "graph", "channels": 1, "size": [8, 8]},
        "stack": {"depth": 1, "width": 16, "init_std": 0.1, "layer": {"heads": 2, "position": "graph", "norm": "layernorm", "ffn": "gelu"}},
        "head": {"kind": "parameters", "classes": 4, "kernel": 5},
    }
    return build(model_spec(spec), 0)


def _batch(generator):
    labels = torch.randint(4, (32,), generator=generator)
    images = 0.3 * torch.rand(32, 1, 8, 8, generator=generator)
    for i, label in enumerate(labels.tolist()):  # the class is the quarter that is bright
        images[i, 0, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 0.7
    return {"pixel_values": images, "labels": labels}


def test_loss_is_the_mean_over_the_drawn_networks_plus_the_norms() -> None:
    ghn, batch = _ghn(), _batch(torch.Generator().manual_seed(0))
    objective = GraphHyperNetwork(nets=3, pool=5, smoothing=0.1, penalty=0.01)
    loss = objective(ghn, batch, torch.Generator().manual_seed(4))
    drawn = random.Random(4).sample(range(5), 3)
    expected = 0.0
    for i in drawn:
        target = target_of(objective.specs[i])
        (made,) = predict(ghn, [target.graph])
        expected += F.cross_entropy(target(made, batch), batch["labels"], label_smoothing=0.1) + 0.01 * sum(t.norm() for t in made.values())
    torch.testing.assert_close(loss.mean, expected / 3)
    loss.mean.backward()
    assert all(p.grad is not None for name, p in ghn.named_parameters() if name.startswith("head."))


def test_the_loss_falls() -> None:
    ghn, generator = _ghn(), torch.Generator().manual_seed(0)
    objective = GraphHyperNetwork(nets=2, pool=2)
    batch = _batch(generator)
    optimizer = torch.optim.AdamW(ghn.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = objective(ghn, batch, generator).mean
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
