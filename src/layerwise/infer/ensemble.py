"""Several language models with one vocabulary answering as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.models.model import Model


def mean_logits(models: Sequence[Model], batch: Mapping[str, Any], **context: Any) -> Float[Tensor, "b s vocab"]:
    """The average of the models' logits: no router, no training, every model runs.

    Its cross-entropy is at most the mean of theirs, since log-sum-exp is convex.

    Raises:
        BadInput: there is no model, or their vocabularies differ.

    Source: Bochkov 2025, "Growing Transformers: Modular Composition and Layer-wise Expansion on a Frozen Substrate"
    (arXiv 2507.07129).
    """
    made = [model(batch, **context).logits for model in models]
    if len({logits.shape for logits in made}) != 1:
        raise BadInput(f"models answer as one if they score the same tokens; their logits are {[tuple(m.shape) for m in made]}")
    return torch.stack(made).mean(dim=0)
