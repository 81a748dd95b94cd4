"""What each parameter of a network is for, as far as optimizers treat them differently."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from layerwise.nn.positions import RelativeBias
from layerwise.stack.depth import depth_of

Role = Literal["embedding", "matrix", "head", "vector"]


def roles(model: nn.Module) -> dict[str, Role]:
    """Parameter name -> role: `vector` (fewer than two dimensions), `embedding` (a lookup table), `head` (the matrix that makes
    the scores), `matrix` (everything else).

    A matrix that is both embedding and head (tied) is the head: an output layer's gradient reaches all of its rows. Names and types
    of other people's modules need not be ours: lookup tables are `nn.Embedding`, the head is what a model of transformers calls its
    output embeddings, or the last matrix after the layers.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding | RelativeBias) for p in m.parameters(recurse=False)}
    head = id(_head(model))

    def role(parameter: Tensor) -> Role:
        if parameter.dim() < 2:
            return "vector"
        return "head" if id(parameter) == head else "embedding" if id(parameter) in tables else "matrix"

    return {name: role(parameter) for name, parameter in model.named_parameters()}


def _head(model: nn.Module) -> Tensor | None:
    for module in model.modules():
        ours: Any = getattr(module, "head", None)
        spec = getattr(getattr(module, "spec", None), "head", None)
        if isinstance(ours, nn.Module) and spec is not None:
            if getattr(spec, "tie", False):
                return module.token_matrix  # type: ignore[return-value]
            return next((p for p in reversed(list(ours.parameters())) if p.dim() >= 2), None)
        theirs: Any = getattr(module, "get_output_embeddings", None)
        if callable(theirs) and theirs() is not None:
            return theirs().weight
    depths = depth_of(model)
    last = max(depths.values(), default=0)
    after = [p for n, p in model.named_parameters() if depths[n] == last and p.dim() >= 2]
    inside = any(depths[n] == last - 1 for n in depths)
    return after[-1] if after and inside else None
