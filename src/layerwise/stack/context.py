"""What travels beside the residual stream through a stack: masks, positions, memory, cache, path, wrappers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.nn.positions import GridBias, RelativeBias, alibi_slopes, rotary_angles
from layerwise.stack.parts_spec import RopeScaling
from layerwise.stack.spec import LayerSpec

if TYPE_CHECKING:
    from layerwise.nn.cache import Cache
    from layerwise.stack.record import Recorder

Call = Callable[[Tensor, "Context"], Tensor]
Around = Callable[[int, Any, Tensor, "Context", Call], Tensor]
"""`around(i, layer, x, ctx, call) -> x` wraps the call of layer `i`; `call(x, ctx)` goes on inward."""

PAD = -1
"""The position of padding: no real position attends to it."""


@dataclass
class Context:
    """One forward pass's surroundings. Build it with what applies; everything has a neutral default.

    Attributes:
        positions: (1 or b, s) position of every query; `PAD` where there is padding. None: counted on from the cache.
        segments: (b, s) document number of every position in a packed row; attention stays inside a document.
        prompt: (b, s) True where a position is of the prompt, for routers that decide by it. None: what a cache sees first, or everything.
        memory: (b, m, width) what cross-attention looks at, and memory_mask (b, m), True where it is real.
        cache: keys and values of earlier positions.
        path: the layers to run, in order; None runs each once. `[0, 1, 1, 3]` loops layer 1 and skips layer 2. Or one path a row.
        around: callables that wrap every layer's call, outermost first.
        recorder: what to leave behind, see `layerwise.stack.record`.
        grid: (rows, columns) of an image's patches, where the positions are a class token and those.
        condition: (b, width) or (b, s, width), a vector that conditions layers (timestep, class).
        extras: anything a part and whoever calls it agree on, by name.
    """

    positions: Int[Tensor, "b s"] | None = None
    segments: Int[Tensor, "b s"] | None = None
    prompt: Bool[Tensor, "b s"] | None = None
    memory: Float[Tensor, "b m width"] | None = None
    memory_mask: Bool[Tensor, "b m"] | None = None
    cache: Cache | None = None
    path: Sequence[int] | Sequence[Sequence[int]] | None = None
    around: tuple[Around, ...] = ()
    recorder: Recorder | None = None
    grid: tuple[int, int] | None = None
    condition: Tensor | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    relative: RelativeBias | GridBias | None = None
    plain: bool = False
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def begin(self, x: Float[Tensor, "b s ..."], relative: RelativeBias | GridBias | None) -> None:
        """Called by the stack: fix the positions of this pass and announce it to the cache.

        Raises:
            BadInput: packed documents are to go on from a cache, which does not know their segments.
        """
        past = self.cache.length if self.cache is not None else 0
        if past and self.segments is not None:
            raise BadInput("packed documents cannot go on from a cache: give each document its row and leave segment_ids out")
        self.relative = relative
        if self.positions is None:
            self.plain = self.segments is None
            if x.dim() == 3:
                self.positions = torch.arange(past, past + x.shape[1], device=x.device)[None]
        if self.cache is not None:
            self.cache.advance(x.shape[1])

    def select(self, tokens: Int[Tensor, "b k"], *, ordered: bool = False) -> Context:
        """The context of a subset of positions: `tokens` are indices into the sequence, for each row.

        Args:
            ordered: they rise in every row and no window is looked through, so a causal mask of the subset is the plain one.
        """
        assert self.positions is not None
        rows = tokens.shape[0]
        chosen = {
            name: value.expand(rows, -1).gather(1, tokens)
            for name in ("positions", "segments", "prompt")
            if (value := getattr(self, name)) is not None
        }
        if self.condition is not None and self.condition.dim() == 3:
            index = tokens[..., None].expand(-1, -1, self.condition.shape[-1])
            chosen["condition"] = self.condition.expand(rows, -1, -1).gather(1, index)
        return dataclasses.replace(self, **chosen, plain=self.plain and ordered, _made={})

    def rows(self, index: Int[Tensor, " k"]) -> Context:
        """The context of some rows of the batch."""
        chosen = {}
        for name in ("positions", "segments", "prompt", "memory", "memory_mask", "condition"):
            value = getattr(self, name)
            if value is not None and value.shape[0] > 1:
                chosen[name] = value[index]
        return dataclasses.replace(self, **chosen, _made={})

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, kept for the rest of this pass: masks and angles are the same for most layers."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def rotary(
        self,
        head_dim: int,
        theta: float,
        dtype: torch.dtype,
        scaling: RopeScaling | None = None,
        positions: Int[Tensor, "b n"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine, (1 or b, 1, s, head_dim), for this pass's positions, or for others that live at least as long as the pass."""
        places = self.positions if positions is None else positions

        def make() -> tuple[Tensor, Tensor]:
            assert places is not None
            cos, sin = rotary_angles(places.clamp(min=0), head_dim, theta, scaling)
            return cos[:, None].to(dtype), sin[:, None].to(dtype)

        return self._once(("rotary", head_dim, theta, dtype, scaling, None if positions is None else id(positions)), make)

    def memory_bias(self) -> Bool[Tensor, "b 1 1 m"] | None:
        """Which memory positions cross-attention may look at; None when all."""
        return None if self.memory_mask is None else self.memory_mask[:, None, None, :]

    def bias(
        self, spec: LayerSpec, q: Float[Tensor, "b h s d"], keys: Int[Tensor, "b k"] | None, table: GridBias | None = None
    ) -> tuple[Tensor | None, bool]:
        """The `attn_mask` and `is_causal` of this layer's attention.

        A row with nothing to hide gets no mask at all, so that the fastest kernel runs. A mask is boolean (True: attend),
        or a float bias with -inf where it may not, when positions act through a bias (ALiBi, relative).

        Args:
            spec: the layer. q: its queries. keys: positions of all keys, where a cache holds earlier ones; else None.
            table: the layer's own bias for offsets on a grid.
        """
        length = q.shape[2]
        biased = spec.position in ("alibi", "relative", "grid", "grid_shared", "graph")
        past = keys is not None and keys.shape[1] > length
        # A layer that was skipped at some steps holds fewer keys than the positions they span.
        reach = self.cache.length if self.cache is not None else length
        narrow = spec.window is not None and reach > spec.window
        if self.plain and not biased and not narrow and (not past or length == 1):
            return None, spec.causal and not past and length > 1
        assert self.positions is not None
        k_positions = self.positions if keys is None else keys
        key = ("bias", spec.causal, spec.window, spec.position, spec.heads, id(k_positions), id(table), q.dtype)
        return self._once(key, lambda: self._bias(spec, k_positions, q, table)), False

    def _bias(self, spec: LayerSpec, keys: Tensor, q: Tensor, table: GridBias | None) -> Tensor:
        assert self.positions is not None
        queries = self.positions
        distance = keys[:, None, :] - queries[:, :, None]
        allowed = (keys >= 0)[:, None, :].expand_as(distance)
        if spec.causal:
            allowed = allowed & (distance <= 0)
        if spec.window is not None:
            allowed = allowed & (distance.abs() < spec.window)
        if self.segments is not None and keys.shape[1] == queries.shape[1]:
            allowed = allowed & (self.segments[:, None, :] == self.segments[:, :, None])
        # A padding query sees everything: its output is never used, and a row without any key would be 0/0.
        allowed = (allowed | (queries == PAD)[:, :, None])[:, None]
        if spec.position == "alibi":
            bias = -alibi_slopes(spec.heads).to(q)[:, None, None] * distance.abs().to(q.dtype)[:, None]
        elif spec.position == "relative":
            assert isinstance(self.relative, RelativeBias)
            bias = self.relative(distance).to(q.dtype)
        elif spec.position in ("grid", "grid_shared"):
            bias = self._grid_bias(table or self.relative, queries, keys).to(q.dtype)
        elif spec.position == "graph":
            if "edge_bias" not in self.extras:
                raise BadInput("a layer with position graph reads the nodes of a graph: the model's embedding must be of kind graph")
            bias = self.extras["edge_bias"].to(q.dtype)
        else:
            return allowed
        return bias.masked_fill(~allowed, float("-inf"))

    def _grid_bias(self, table: Any, queries: Tensor, keys: Tensor) -> Float[Tensor, "b h q k"]:
        """The bias of a `GridBias` at the positions there are: all of them, or those that a subset of the tokens has kept."""
        if self.grid is None:
            raise BadInput("a layer with position grid reads the patches of an image: the model's embedding must be of kind patches")
        whole = table(self.grid)
        if self.plain:
            return whole[None]
        return whole[:, queries[:, :, None].clamp(min=0), keys[:, None, :].clamp(min=0)].transpose(0, 1)
