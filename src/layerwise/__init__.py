"""layerwise: every network is a stack of layers.

    import layerwise as lw
    model = lw.load("path/to/checkpoint")
    smaller = lw.edit.drop_layers(model, data, count=2)
    lw.export(smaller, "out", format="hf")

Names are imported when they are first used, so `import layerwise` is instant.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "load": "layerwise.models.load:load_any",
    "save": "layerwise.models.checkpoint:save",
    "export": "layerwise.models.load:export",
    "view": "layerwise.stack.depth:view",
    "depth_of": "layerwise.stack.depth:depth_of",
    "record": "layerwise.stack.record:record",
    "generate": "layerwise.infer.generate:generate",
    "sentence_embeddings": "layerwise.infer.sentences:sentence_embeddings",
    "run": "layerwise.jobs.api:run",
    "load_data": "layerwise.jobs.api:prepared",
    "edit": "layerwise.edit:",
    "analyze": "layerwise.analyze:",
    "evaluate": "layerwise.evaluate:",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'layerwise' has no attribute '{name}'")
    module, attribute = _NAMES[name].split(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
