"""Which weights a network could do without, by size."""

from __future__ import annotations

import math
from typing import Any

import torch

from layerwise.analyze.findings import Findings, Matrix, Table
from layerwise.edit.prune.magnitude import kernels, preview_prune
from layerwise.models.model import Model


def weight_sizes(model: Model, data: Any = None, *, ratio: float = 10.0, bins: int = 40) -> Findings:
    """How the sizes of the kernels' weights are spread, and what a global cut to 1 / ratio of them would leave in each kernel.

    Metrics: `cut_mass`, the share of the sum of squares that the cut would remove (0: the cut costs nothing); `size_gap`, log10 of
    the smallest kept size over the largest dropped one's neighbourhood (the median dropped size): how far apart the two groups are.
    """
    preview_prune(model.spec, ratio=ratio)
    found = kernels(model)
    sizes = torch.cat([p.detach().abs().flatten() for p in found.values()]).double()
    kept = max(int(len(sizes) / ratio), 1)
    ordered = sizes.sort(descending=True).values
    dropped = ordered[kept:]
    mass = float(dropped.square().sum() / ordered.square().sum().clamp(min=1e-300))
    middle = float(dropped.median()) if len(dropped) else 0.0
    gap = math.log10(float(ordered[kept - 1]) / max(middle, 1e-30))
    rows: list[list] = [
        [
            name,
            int((p.detach().abs() >= ordered[kept - 1]).sum()),
            p.numel(),
            float((p.detach().abs() >= ordered[kept - 1]).double().mean()),
        ]
        for name, p in found.items()
    ]
    logs = sizes.clamp(min=1e-12).log10()
    counts = torch.histc(logs, bins=bins, min=-12, max=float(logs.max()) + 1e-9)
    edges = torch.linspace(-12, float(logs.max()), bins).tolist()
    histogram = Matrix("Sizes of weights", "log10 of the size", "", [round(e, 2) for e in edges], ["weights"], [counts.tolist()])
    table = Table("What a global cut leaves", ["kernel", "left", "of", "share"], rows)
    return Findings({"cut_mass": mass, "size_gap": gap}, [table], [histogram])
