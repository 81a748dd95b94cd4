"""What a layer keeps of earlier keys and values where it does not keep all of them: one class for each kind of `CacheSpec`.

Attention hands a store its input and its keys and values, and gets those that the pass attends to and their positions:
`store.extend(attention, x, k, v, ctx) -> (k, v, positions)`.
"""

from __future__ import annotations

from typing import Any

from layerwise.stack.parts_spec import CacheSpec
from layerwise.table import lookup

STORES = {
    "low-rank": "layerwise.nn.caches.thin:ThinStore",
    "recent": "layerwise.nn.caches.recent:RecentStore",
    "heavy": "layerwise.nn.caches.heavy:HeavyStore",
}


def make_store(spec: CacheSpec) -> Any:
    """An empty store of the kind that `spec` names."""
    return lookup(STORES, spec.kind, "kind of cache")(spec)
