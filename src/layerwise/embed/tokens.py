"""Token embeddings with absolute positions and token types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.embed.frozen import FrozenTable, binary_table, glyph_table
from layerwise.embed.one_bit import OneBitTable, PackedTable
from layerwise.embed.packed import IntegerTable
from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.nn.norms import fill_norm, make_norm
from layerwise.nn.positions import sinusoids

TABLES: dict[str, type[nn.Module]] = {"learned": nn.Embedding, "one-bit": OneBitTable, "one-bit-packed": PackedTable}


class TokenEmbedding(nn.Module):
    """scale * E[ids] + P[positions] + T[types], normalized, dropped out and projected as the spec says: (b, s) -> (b, s, width)."""

    def __init__(self, spec: TokenSpec, width: int) -> None:
        super().__init__()
        assert spec.vocab is not None, "the vocabulary size is filled in before a model is built"
        self.spec, self.width = spec, width
        size = spec.size or width
        self.tokens: Any = (
            IntegerTable(spec.vocab, size, spec.bits, spec.group)
            if spec.table == "packed"
            else TABLES.get(spec.table, FrozenTable)(spec.vocab, size)
        )
        self.positions = nn.Embedding(spec.max_length + spec.offset, size) if spec.position == "learned" else None
        self.types = nn.Embedding(spec.types, size) if spec.types else None
        self.norm = make_norm(spec.norm, size, spec.norm_eps) if spec.norm else None
        self.dropout = nn.Dropout(spec.dropout)
        self.project = nn.Linear(size, width) if spec.size is not None else None

    def forward(self, batch: Mapping[str, Any], positions: Tensor) -> Tensor:
        """Embed `batch["input_ids"]` at `positions` (1 or b, s); padding's position -1 counts as 0 where there is no offset."""
        x = self.tokens(batch["input_ids"])
        if self.spec.scale != 1.0:
            # The factor is rounded to the vectors' type first, as in the models that have one.
            x = x * torch.full((), self.spec.scale, dtype=x.dtype, device=x.device)
        if self.positions is not None:
            x = x + self.positions((positions + self.spec.offset).clamp(min=0))
        elif self.spec.position == "sinusoidal":
            x = x + sinusoids(positions.clamp(min=0), x.shape[-1]).to(x.dtype)
        if self.types is not None:
            kinds = batch.get("token_type_ids")
            x = x + (self.types.weight[0] if kinds is None else self.types(kinds))
        x = self.dropout(x if self.norm is None else self.norm(x))
        return x if self.project is None else self.project(x)

    def initialize(self, std: float, generator: torch.Generator) -> None:
        table_std = std if self.spec.std is None else self.spec.std
        if isinstance(self.tokens, FrozenTable):
            self.tokens.weight.copy_(self._frozen(self.tokens.weight.shape[1]))
        for table in (self.tokens, self.positions, self.types):
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=table_std, generator=generator)
        if isinstance(self.tokens, PackedTable | IntegerTable):
            drawn = torch.empty(self.spec.vocab or 0, self.tokens.size, device=generator.device)
            self.tokens.store(drawn.normal_(std=table_std, generator=generator))
        if self.norm is not None:
            fill_norm(self.norm, 1.0)
        if self.project is not None:
            nn.init.normal_(self.project.weight, std=std, generator=generator)
            nn.init.zeros_(self.project.bias)

    def _frozen(self, size: int) -> Tensor:
        """The vectors of a table that is not learned."""
        vocab, strings = self.spec.vocab or 0, self.spec.strings
        if self.spec.table == "binary":
            return binary_table(vocab, size)
        if len(strings) != vocab:
            raise BadInput(f"embedding.strings says what to draw for each of the {vocab} tokens; it has {len(strings)}")
        return glyph_table(strings, size)
