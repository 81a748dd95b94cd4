"""What a linear classifier reads from frozen hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from layerwise.analyze.findings import Findings, Table
from layerwise.data.turns import turned
from layerwise.embed.spec import PatchSpec, PixelSpec, StemSpec
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.models.heads import pool
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec

Target = Literal["label", "quarters", "levels"]


def linear_probe(
    model: Model,
    data: Any,
    *,
    layers: Sequence[int] | Literal["all"] | None = None,
    filtered: bool = False,
    target: Target = "label",
    pool_by: Literal["mean", "first", "last"] = "mean",
    penalty: float = 1.0,
    split: str = "validation",
    batch: int = 64,
    batches_at_most: int | None = None,
    seed: int | None = None,
) -> Findings:
    """Accuracy of logistic regression on the pooled states of each layer: fitted on the training split, measured on another.

    States are reduced to one vector a row (padding left out) and standardized. The model stays as it is, in evaluation mode.

    Metrics: `probe_accuracy` of the last of `layers`, `best_probe_accuracy` of the best one. The table has all of them.

    Args:
        layers: counted from 0, negative from the top, or `all`; None: what leaves the last layer and its norm.
        filtered: through the layers' filters, where they have them.
        target: the rows' labels; or what was done to images that are turned and dimmed at random, their `quarters` or `levels` (see
            `layerwise.data.turns`), to see what else a layer knows.
        pool_by: how positions are reduced. penalty: of the squared weights, scikit-learn's 1 / C.
        batches_at_most: of each split, evenly spread. seed: of what is done to images.

    Raises:
        BadInput: layers that are not there, data without labels, or filters that the model has not.

    Source: Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes".
    """
    check_probe(model.spec, layers=layers, filtered=filtered, target=target)
    depth = model.stack.depth
    places = list(range(depth)) if layers == "all" else [int(i) % depth for i in layers] if layers is not None else None
    seen = {
        name: _states(model, split_of(data, name), places, filtered, target, pool_by, batch, batches_at_most, (seed or 0) + k)
        for k, name in enumerate(("train", split))
    }
    rows: list[list[Any]] = []
    for place in places if places is not None else [None]:
        rows.append([depth if place is None else place, fitted(*((states[place], y) for states, y in seen.values()), penalty=penalty)])
    accuracies = [row[1] for row in rows]
    table = Table(f"Accuracy of a linear probe for the {target}", ["layer", "accuracy"], rows)
    return Findings({"probe_accuracy": accuracies[-1], "best_probe_accuracy": max(accuracies)}, [table])


def check_probe(spec: ModelSpec, *, layers: Sequence[int] | Literal["all"] | None, filtered: bool, target: Target, **_: Any) -> None:
    """Raises BadInput: layers that are not there, filters that the model has not, or turned images of a model that reads none."""
    if filtered and (spec.filters is None or layers is None):
        raise BadInput("filtered probes read layers that have filters: give the model some (edit: add-filters), and name layers")
    depth = spec.stack.depth
    if layers is not None and not layers:
        raise BadInput("layers names none to probe: give some, all, or leave it out for what leaves the last one")
    if layers is not None and layers != "all" and (bad := [i for i in layers if not -depth <= int(i) < depth]):
        raise BadInput(f"cannot probe layer {bad[0]}: the model has layers 0 to {depth - 1}")
    if target != "label" and not isinstance(spec.embedding, PixelSpec | PatchSpec | StemSpec):
        raise BadInput(f"target {target} is about images that are turned; this model reads none")


def fitted(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, penalty: float = 1.0) -> float:
    """Accuracy on `test` of logistic regression on standardized `train`, each (rows (n, width), classes (n,))."""
    from sklearn.linear_model import LogisticRegression

    mean, std = train[0].mean(dim=0), train[0].std(dim=0).clamp(min=1e-6)
    x, z = ((rows - mean).div(std).double().numpy() for rows, _ in (train, test))
    found = LogisticRegression(C=1 / penalty, max_iter=500).fit(x, train[1].numpy())
    return float(np.mean(found.predict(z) == test[1].numpy()))


def _states(
    model: Model,
    rows: Any,
    places: Sequence[int] | None,
    filtered: bool,
    target: Target,
    pool_by: str,
    batch: int,
    limit: int | None,
    seed: int,
) -> tuple[dict[int | None, Tensor], Tensor]:
    """Layer -> its pooled states (n, width), and the target (n,), of a split."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[int | None, list[Tensor]] = {place: [] for place in (places if places is not None else [None])}
    wanted: list[Tensor] = []
    with inference(model):
        for given in batches(rows, batch, limit, model.device):
            if target == "label":
                if "labels" not in given or given["labels"].dim() != 1:
                    raise BadInput("a linear probe for the label needs data with one label a row")
                wanted.append(given["labels"].cpu())
            else:
                pixels, quarters, levels = turned(given["pixel_values"], generator)
                given = {**given, "pixel_values": pixels}
                wanted.append((quarters if target == "quarters" else levels).cpu())
            out = model({name: value for name, value in given.items() if name != "labels"}, hiddens=places is not None)
            for place, states in kept.items():
                hidden = out.hidden if place is None else (out.hiddens or ())[place]
                if filtered and place is not None and model.filters is not None:
                    hidden = model.filters(place, hidden)
                states.append(pool(hidden, pool_by, out.mask).float().cpu())
    return {place: torch.cat(states) for place, states in kept.items()}, torch.cat(wanted)
