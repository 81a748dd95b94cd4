"""Choosing the tokens that a masked language model predicts, on the device the tokens are on."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def mask_tokens(
    ids: Int[Tensor, "b s"],
    *,
    rate: float = 0.15,
    mask_id: int,
    vocab: int,
    special_ids: Int[Tensor, " n"],
    generator: torch.Generator | None = None,
    attention_mask: Tensor | None = None,
    replace: tuple[float, float, float] = (0.8, 0.1, 0.1),
) -> tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]:
    """Inputs with some tokens hidden, and labels: the hidden tokens, -100 elsewhere. Source: Devlin et al. 2019, section 3.1.

    Args:
        rate: share of the ordinary tokens that get a label.
        special_ids: tokens that are never chosen. attention_mask: nor are positions where it is 0.
        replace: of the chosen, the shares that become `mask_id`, a random token, and stay as they are.
    """
    ordinary = ~torch.isin(ids, special_ids.to(ids.device))
    if attention_mask is not None:
        ordinary &= attention_mask.bool()
    draw = torch.rand(ids.shape, device=ids.device, generator=generator)
    chosen = ordinary & (draw < rate)
    # A batch without any label has no loss: the ordinary token with the smallest draw is always chosen.
    first = draw.masked_fill(~ordinary, 2.0).flatten().argmin().view(1)
    chosen.view(-1)[first] |= ordinary.view(-1)[first]
    labels = ids.masked_fill(~chosen, -100)
    how = torch.rand(ids.shape, device=ids.device, generator=generator)
    noise = torch.randint(vocab, ids.shape, device=ids.device, generator=generator)
    hidden = ids.masked_fill(chosen & (how < replace[0]), mask_id)
    return torch.where(chosen & (how >= replace[0]) & (how < replace[0] + replace[1]), noise, hidden), labels
