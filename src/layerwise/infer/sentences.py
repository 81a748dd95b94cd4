"""Texts to vectors: what an encoder makes of whole sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from layerwise.errors import BadInput
from layerwise.evaluate.batches import inference
from layerwise.models.heads import pool
from layerwise.models.model import Model


def sentence_embeddings(
    model: Model,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    how: str | None = None,
    normalize: bool = True,
    length: int = 256,
    batch: int = 32,
) -> Float[Tensor, "texts width"]:
    """One vector a text, in the order given.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; its own truncation and padding are left aside, its special tokens added.
        how: `mean` or `max` of the hidden vectors of all real tokens, the `first` ([CLS]) or the `last` (None: the model's own).
        normalize: vectors of length 1, so that their products are cosines.
        length: tokens that are looked at, special ones included.

    Raises:
        BadInput: the model reads no text, or there is none to read.
    """
    if not texts or isinstance(texts, str):
        raise BadInput("texts is a list of at least one text")
    tokenizer = type(tokenizer).from_str(tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    rows = [torch.tensor(e.ids) for e in tokenizer.encode_batch(list(texts))]
    if empty := [t for t, r in zip(texts, rows, strict=True) if not len(r)]:
        raise BadInput(f"the text {empty[0]!r} has no tokens")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # texts of like length together: little padding
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    with inference(model):
        for start in range(0, len(order), batch):
            these = order[start : start + batch]
            ids = torch.nn.utils.rnn.pad_sequence([rows[i] for i in these], batch_first=True).to(model.device)
            lengths = torch.tensor([len(rows[i]) for i in these], device=model.device)
            mask = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
            out = model({"input_ids": ids, "attention_mask": mask.long()})
            vectors = out.pooled if how is None else pool(out.hidden, how, mask)
            for i, vector in zip(these, F.normalize(vectors, dim=-1) if normalize else vectors, strict=True):
                found[i] = vector
    return torch.stack(found)
