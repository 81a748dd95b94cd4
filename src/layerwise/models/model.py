"""A model: embedding -> stack -> [target embedding -> decoder stack] -> head."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from layerwise.embed.audio_spec import MelSpec, WaveSpec
from layerwise.embed.graph import GraphEmbedding
from layerwise.embed.mel import MelEmbedding
from layerwise.embed.patches import PatchEmbedding
from layerwise.embed.pixels import PixelEmbedding
from layerwise.embed.spec import GraphSpec, PatchSpec, PixelSpec, StemSpec, TokenSpec
from layerwise.embed.stem import StemEmbedding
from layerwise.embed.tokens import TokenEmbedding
from layerwise.embed.wave import WaveEmbedding
from layerwise.errors import BadInput
from layerwise.memory import check_room
from layerwise.models.filters import Filters
from layerwise.models.ghn import ParameterHead
from layerwise.models.heads import ClassifierHead, LMHead, pool
from layerwise.models.origin import origin_of, with_origin
from layerwise.models.spec import ModelSpec
from layerwise.nn.cache import Cache
from layerwise.stack.context import PAD, Around, Context
from layerwise.stack.stack import Stack
from layerwise.table import lookup

MODELS = {"ModelSpec": "layerwise.models.model:Model", "TwoTowersSpec": "layerwise.models.two_towers:TwoTowers"}
"""By the name of what describes them."""


@dataclasses.dataclass
class Output:
    """What a forward pass made.

    Attributes:
        hidden: the (last) stack's output, (b, s, width) or (b, c, h, w).
        hiddens: every layer's output, if `hiddens=True` was asked for. entered: what the first of them got, then.
        memory: the encoder's output, in an encoder-decoder.
        ends: (b,) where each text ends, for a head that pools there.
    """

    hidden: Tensor
    model: Model
    mask: Tensor | None = None
    hiddens: tuple[Tensor, ...] | None = None
    memory: Tensor | None = None
    ends: Tensor | None = None
    entered: Tensor | None = None

    @property
    def pooled(self) -> Tensor:
        """(b, width): positions reduced as the head's `pool` says, or without a head the model's.

        Raises:
            BadInput: the checkpoint that the model came from has a way that is not known here.
        """
        spec = self.model.spec
        return pool(self.hidden, spec.pooling, self.mask, getattr(spec.embedding, "prefix", 0), self.ends)

    @property
    def logits(self) -> Tensor:
        """The head's scores, computed when asked for: (b, s, vocab), (b, classes), or a projection's vectors (b, size)."""
        head = self.model.head
        if head is None:
            raise AttributeError("this model has no head, so it has no logits")
        if isinstance(head, ParameterHead):
            raise AttributeError("this model makes parameters and no logits: see layerwise.models.ghn.predict")
        return head(self.hidden, self.model.token_matrix) if isinstance(head, LMHead) else head(self.pooled)


class Model(nn.Module):
    """An assembled network. Build one with `build(spec, seed)`, load one with `layerwise.load`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.stack.width
        self.embedding = _embedding(spec, width)
        self.stack = Stack(spec.stack)
        self.target = TokenEmbedding(spec.target, spec.decoder.width) if spec.target is not None and spec.decoder is not None else None
        self.decoder = Stack(spec.decoder) if spec.decoder is not None else None
        self.head: LMHead | ClassifierHead | ParameterHead | None = None
        if spec.head is not None:
            out = spec.decoder.width if spec.decoder is not None else width
            tokens = spec.target or spec.embedding
            if spec.head.kind == "parameters":
                self.head = ParameterHead(spec.head, out)
            elif spec.head.kind != "lm":
                self.head = ClassifierHead(spec.head, out)
            else:
                assert isinstance(tokens, TokenSpec) and tokens.vocab
                self.head = LMHead(spec.head, out, tokens.vocab)
        self.filters = Filters(spec.filters, width) if spec.filters is not None else None
        if spec.adapters_only:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(".lora_" in name)

    @property
    def token_matrix(self) -> Tensor:
        """The output side's token embedding, (vocab, width)."""
        embedding: Any = self.target if self.target is not None else self.embedding
        return embedding.tokens.weight

    @property
    def causal(self) -> bool:
        """Whether the model can continue a text token by token."""
        return self.spec.causal

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        batch: Mapping[str, Any],
        *,
        hiddens: bool = False,
        cache: Cache | None = None,
        memory: Tensor | None = None,
        source_around: tuple[Around, ...] = (),
        **context: Any,
    ) -> Output:
        """Run the model.

        Args:
            batch: `input_ids` (b, s) with optional `attention_mask` (b, s, or b, past + s with a cache; 1 = real),
                `position_ids`, `segment_ids` (document of each packed position), `prompt_mask` (1 = prompt) and `token_type_ids`; or `pixel_values`
                (b, c, h, w), with optional `bool_masked_pos` (b, patches; True = hidden) for patches; or
                the nodes of graphs (`layerwise.models.graph.graph_batch`); or
                `input_values` (b, samples) with optional `attention_mask` (b, samples) and `mask_time_indices` (b, frames; True = hidden);
                or `input_features` (b, mels, frames). An encoder-decoder also reads `decoder_input_ids` and `decoder_attention_mask`.
            hiddens: keep every layer's output in `Output.hiddens`, and what the first one got in `Output.entered`.
            cache: keys and values of earlier positions (of the decoder, in an encoder-decoder).
            memory: the encoder's output, when it is known already.
            source_around: what wraps the layers of an encoder-decoder's encoder; `around` wraps those of its decoder.
            context: further fields of `Context`: `path`, `around`, `recorder`, `condition`, ...

        Returns:
            Output. Its logits are computed only when read.
        """
        kept: list[Tensor] = []
        entered: Tensor | None = None
        if hiddens:

            def keep(i: int, layer: nn.Module, x: Tensor, ctx: Context, call: Any) -> Tensor:
                nonlocal entered
                entered = x if entered is None else entered
                kept.append(call(x, ctx))
                return kept[-1]

            context["around"] = (keep, *context.get("around", ()))  # outermost: what the next layer gets
        if self.decoder is None:
            hidden, mask = self._run(self.embedding, self.stack, batch, cache, context)
            return Output(hidden, self, mask, tuple(kept) or None, ends=self._ends(batch), entered=entered)
        mask = self._source_mask(batch)
        if memory is None:
            memory, _ = self._run(self.embedding, self.stack, batch, None, {"around": source_around})
        target = {"input_ids": batch["decoder_input_ids"], "attention_mask": batch.get("decoder_attention_mask")}
        context |= {"memory": memory, "memory_mask": mask}
        hidden, mask = self._run(self.target or self.embedding, self.decoder, target, cache, context)
        return Output(hidden, self, mask, tuple(kept) or None, memory, entered=entered)

    def _run(
        self, embedding: nn.Module, stack: Stack, batch: Mapping[str, Any], cache: Cache | None, context: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(embedding, PatchEmbedding):
            return stack(embedding(batch), Context(**{"grid": embedding.grid(batch["pixel_values"]), **context})), None
        if isinstance(embedding, GraphEmbedding):
            real = batch["graph_mask"]
            nodes = torch.arange(real.shape[1], device=real.device).masked_fill(~real, PAD)
            context["extras"] = {**context.get("extras", {}), "edge_bias": embedding.edge_bias(batch)}
            return stack(embedding(batch), Context(positions=nodes, **context)), real
        if isinstance(embedding, PixelEmbedding | StemEmbedding):
            return stack(embedding(batch), Context(**context)), None
        if isinstance(embedding, MelEmbedding):
            return stack(embedding(batch), Context(**context)), None
        if isinstance(embedding, WaveEmbedding):
            mask = embedding.frame_mask(batch)
            places = None if mask is None else torch.arange(mask.shape[1], device=mask.device).masked_fill(~mask, PAD)
            return stack(embedding(batch, mask), Context(positions=places, **context)), mask
        ids = batch["input_ids"]
        mask = _mask(batch.get("attention_mask"))
        positions = token_positions(ids, mask, batch.get("position_ids"), cache)
        ctx = Context(
            positions=positions, segments=batch.get("segment_ids"), prompt=_mask(batch.get("prompt_mask")), cache=cache, **context
        )
        if positions is None:
            past = cache.length if cache is not None else 0
            positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        return stack(embedding(batch, positions), ctx), None if mask is None else mask[:, -ids.shape[1] :]

    def _source_mask(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Which positions of what the encoder makes are real; None when all are."""
        if isinstance(self.embedding, WaveEmbedding):
            return self.embedding.frame_mask(batch)
        return None if isinstance(self.embedding, MelEmbedding) else _mask(batch.get("attention_mask"))

    def _ends(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Where each text ends, if the head wants to know."""
        head = self.spec.head
        if head is None or head.pool != "end":
            return None
        ids = batch["input_ids"]
        return ids.argmax(dim=1) if head.end_token is None else (ids == head.end_token).int().argmax(dim=1)

    def initialize(self, generator: torch.Generator) -> Model:
        """Fresh weights, in place."""
        std = getattr(self.spec.stack, "init_std", None)
        parts: list[Any] = [self.embedding, self.target, self.head, self.filters]
        for part in parts:
            if part is not None:
                part.initialize(std, generator)
        self.stack.initialize(generator)
        if self.decoder is not None:
            self.decoder.initialize(generator)
        return self

    def with_stack(self, stack: Stack) -> Model:
        """This model around another stack; everything else is shared."""
        new = copy.copy(self)
        new._modules = {**self._modules, "stack": stack}
        new.spec = dataclasses.replace(self.spec, stack=stack.spec)
        return new

    def with_head(self, head: nn.Module | None, spec: Any) -> Model:
        """This model with another head; everything else is shared."""
        new = copy.copy(self)
        new._modules = {**self._modules, "head": head}
        new.spec = dataclasses.replace(self.spec, head=spec)
        return new


def token_positions(ids: Int[Tensor, "b s"], mask: Tensor | None, given: Tensor | None, cache: Cache | None) -> Tensor | None:
    """Position of every query, padding at `PAD`; None when they simply count on from the cache.

    With a mask, real tokens are counted from the left, so padding on either side moves nothing.

    Raises:
        BadInput: the mask does not cover the cache and the tokens.
    """
    if mask is None:
        return given
    past = cache.length if cache is not None else 0
    if mask.shape[1] != past + ids.shape[1]:
        raise BadInput(f"attention_mask covers {mask.shape[1]} positions; there are {past} in the cache and {ids.shape[1]} in input_ids")
    counted = mask.long().cumsum(dim=1) - 1 if given is None else given
    if counted.shape[1] != mask.shape[1]:
        return counted.masked_fill(~mask[:, -counted.shape[1] :], PAD)
    return counted.masked_fill(~mask, PAD)[:, -ids.shape[1] :]


def make_model(spec: Any) -> Any:
    """The module that a description of any kind describes, its weights not filled in."""
    return lookup(MODELS, type(spec).__name__, "model")(spec)


def build(spec: Any, seed: int = 0, device: str | torch.device = "cpu") -> Any:
    """A new model with weights drawn from `seed`: laid out without memory first, filled once.

    Raises:
        BadInput: it would not fit this machine.
    """
    with torch.device("meta"):
        model = make_model(spec)
    count = sum(p.numel() for p in model.parameters())
    check_room(4 * count, f"a model of {count:,} parameters")
    model.to_empty(device=device)
    return model.initialize(torch.Generator(device=device).manual_seed(seed))


def rebuilt(model: Model, spec: ModelSpec) -> Model:
    """A model of another spec that shares every tensor of `model` whose name and shape it has.

    What is new is left on the meta device, without values: the caller fills it. The new model remembers where the old one came from.
    """
    with torch.device("meta"):
        new = Model(spec)
    shapes = {name: t.shape for name, t in new.state_dict().items()}
    shared = {name: t for name, t in model.state_dict().items() if shapes.get(name) == t.shape}
    new.load_state_dict(shared, strict=False, assign=True)
    return with_origin(new.train(model.training), origin_of(model))


def _embedding(whole: ModelSpec, width: int) -> nn.Module:
    spec: Any = whole.embedding
    if isinstance(spec, GraphSpec):
        layer: Any = whole.stack.layers[0]
        return GraphEmbedding(spec, width, layer.heads, whole.head.classes if whole.head is not None else None)
    kinds = {PixelSpec: PixelEmbedding, StemSpec: StemEmbedding, WaveSpec: WaveEmbedding, MelSpec: MelEmbedding, PatchSpec: PatchEmbedding}
    return kinds.get(type(spec), TokenEmbedding)(spec, width)


def _mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()
