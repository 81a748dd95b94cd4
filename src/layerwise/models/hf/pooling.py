"""How a checkpoint of sentence-transformers makes one vector of a text's positions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from layerwise.models.spec import Pooling

CONFIG = "1_Pooling/config.json"
MODES: dict[str, Pooling] = {"mean": "mean", "cls": "first", "lasttoken": "last", "max": "max"}
"""Their names and ours. Sums over square roots, weighted means and several vectors side by side are theirs alone."""
FORMER = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Keys that were true or false before `pooling_mode` named the way."""


def pooling_of(sidecars: Mapping[str, str]) -> Pooling | None:
    """The way that a checkpoint's pooling settings name: the mean where there are none, None where it is not known here."""
    if CONFIG not in sidecars:
        return "mean"
    settings: Any = json.loads(sidecars[CONFIG])
    if not isinstance(settings, dict):
        return None
    named = settings.get("pooling_mode", [name for key, name in FORMER.items() if settings.get(key)] or "mean")
    modes = [named] if isinstance(named, str) else named
    return next((ours for theirs, ours in MODES.items() if modes == [theirs]), None)
