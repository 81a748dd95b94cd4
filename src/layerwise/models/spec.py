"""What a model is: an embedding, a stack, perhaps a second embedding and stack that look at the first, a head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag, TypeAdapter

from layerwise.complaint import FORBID
from layerwise.embed.audio_spec import MelSpec, WaveSpec
from layerwise.embed.spec import GraphSpec, PatchSpec, PixelSpec, StemSpec, TokenSpec
from layerwise.errors import BadInput
from layerwise.models.plain_spec import PlainStackSpec
from layerwise.stack.spec import Activation, Norm, StackSpec

Pooling = Literal["mean", "first", "last", "max"]
UNKNOWN_POOLING = (
    "this checkpoint makes one vector of a text in a way that is not known here (1_Pooling/config.json); known are mean, cls, lasttoken and "
    "max, one of them"
)


@dataclass(frozen=True)
class HeadSpec:
    """What stands on top of the stack.

    Attributes:
        kind: `lm` scores the vocabulary at every position; `classifier` scores `classes` for the pooled input; `projection` makes a
            vector of `size` numbers of it (CLIP's towers); `parameters` makes the weights of the network whose graph was read
            (`layerwise.models.ghn`).
        tie: the lm head multiplies by the token embedding itself.
        bias: a bias on the scores.
        transform: BERT's dense + activation + norm before the scores (None: none).
        size: of the vectors that the scores are made from (None: the stack's width); a transform, a projection or a classifier's first
            linear map makes them.
        scale: multiplies the hidden vectors before the scores (T5 with a tied head uses width^-1/2).
        classes: number of classes (None: the data's; filled in when the job runs).
        pool: how a classifier reduces positions: their mean, the first or the last real one; the mean of an image's patches alone, or the
            first beside that (`first_and_patches`, DINOv2); the first two, each with a matrix of its own (`distilled`, DeiT); where
            the text ends (`end`, CLIP). `none` scores every position (CTC, tagging). Spatial maps use the mean.
        end_token: the token whose first place `end` takes (None: the highest number in the text, as OpenAI's code does).
        pool_norm: a norm on what a classifier pooled, with norm_eps (None: none).
        pooler: a map of what a classifier pooled, between it and the dropout: `dense`, BERT's tanh(W h + b), or `binary`, BiPFT's
            tanh(norm(Wb h) + h) with a one-bit matrix (`binary-packed`: the same, kept packed); None: none.
        dropout: before the classifier.
        kernel: rows and columns of the largest convolution that a head of kind parameters makes in one piece.
        shrink: what it divides the initial weights of its last layers by (5 as published; less starts faster).
    """

    kind: Literal["lm", "classifier", "projection", "parameters"] = "lm"
    tie: bool = False
    bias: bool = False
    transform: Activation | None = None
    norm: Norm = "layernorm"
    norm_eps: float = 1e-12
    size: int | None = None
    scale: float = 1.0
    classes: int | None = None
    pool: Literal["mean", "first", "last", "patches", "first_and_patches", "distilled", "end", "none"] = "mean"
    end_token: int | None = None
    pool_norm: Norm | None = None
    pooler: Literal["dense", "binary", "binary-packed"] | None = None
    dropout: float = 0.0
    kernel: int = 11
    shrink: float = 5.0

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout is a probability in [0, 1); it is {self.dropout}")
        if self.kernel < 1 or self.shrink <= 0:
            raise BadInput(f"kernel is at least 1 and shrink positive; they are {self.kernel} and {self.shrink}")
        if self.norm_eps < 0:
            raise BadInput(f"norm_eps must be >= 0; it is {self.norm_eps}")
        if self.pooler is not None and (self.kind != "classifier" or self.pool not in ("mean", "first", "last")):
            raise BadInput(f"pooler maps the one vector that a classifier pooled; this head is of kind {self.kind} with pool {self.pool}")
        if self.kind == "projection" and self.size is None:
            raise BadInput("a head of kind projection needs head.size, the size of the vectors it makes")
        if self.size is not None and (self.size < 1 or (self.transform is None and self.kind == "lm")):
            raise BadInput(
                f"size ({self.size}) must be at least 1 and needs a transform, a projection or a classifier, which makes vectors of that size"
            )


def _embedding_kind(value: Any) -> str:
    return (value.get("kind", "tokens") if isinstance(value, dict) else getattr(value, "kind", "tokens")) or "tokens"


def _stack_kind(value: Any) -> str:
    return (
        "plain"
        if isinstance(value, PlainStackSpec) or (isinstance(value, dict) and isinstance(value.get("layers"), list | tuple))
        else "layers"
    )


EmbeddingSpec = Annotated[
    Annotated[TokenSpec, Tag("tokens")]
    | Annotated[PixelSpec, Tag("pixels")]
    | Annotated[GraphSpec, Tag("graph")]
    | Annotated[PatchSpec, Tag("patches")]
    | Annotated[StemSpec, Tag("stem")]
    | Annotated[WaveSpec, Tag("wave")]
    | Annotated[MelSpec, Tag("mel")],
    Discriminator(_embedding_kind),
]
AnyStackSpec = Annotated[Annotated[StackSpec, Tag("layers")] | Annotated[PlainStackSpec, Tag("plain")], Discriminator(_stack_kind)]


@dataclass(frozen=True)
class FilterSpec:
    """Small trained maps that read what some layers hand on (`layerwise.models.filters`).

    Attributes:
        layers: which, counted from 0. size: of the vectors that come out.
        activation: between two linear maps (None: there is one map).
    """

    layers: tuple[int, ...]
    size: int
    activation: Activation | None = None

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0 or self.size < 1:
            raise BadInput(
                f"filters read some layers, each once, and make vectors of at least one number; got {self.layers} and {self.size}"
            )


@dataclass(frozen=True)
class ModelSpec:
    """A whole model.

    Attributes:
        embedding, stack, head: input, layers, output. head None: the model only makes hidden states.
        decoder: a second stack (with `cross` layers) over the target tokens, which makes this an encoder-decoder.
        target: the decoder's embedding; None shares the encoder's.
        adapters_only: every parameter is frozen except low-rank terms (LoRA).
        filters: maps that read layers' outputs in distillation; the model computes the same without them.
        pool: without a head, how positions become the one vector of a text or an image: over the real ones (None: in a way that is not
            known here, and asking for the vector is an error).
    """

    embedding: EmbeddingSpec = field(default_factory=TokenSpec)
    stack: AnyStackSpec = field(default_factory=StackSpec)
    head: HeadSpec | None = field(default_factory=HeadSpec)
    decoder: StackSpec | None = None
    target: TokenSpec | None = None
    adapters_only: bool = False
    filters: FilterSpec | None = None
    pool: Pooling | None = "mean"

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        self._check_filters()
        if isinstance(self.stack, PlainStackSpec) and isinstance(self.embedding, TokenSpec):
            raise BadInput("a stack of convolutional or dense layers reads images: set embedding.kind to pixels")
        if isinstance(self.embedding, PixelSpec | StemSpec):
            self._check_pixels(self.embedding)
        self._check_patches(self.embedding)
        self._check_sound(self.embedding)
        self._check_graph(self.embedding)
        if self.decoder is not None and self.decoder.width != self.stack.width:
            raise BadInput(f"the decoder looks at what the encoder made: its width ({self.decoder.width}) must be {self.stack.width}")
        if self.decoder is not None and not all(s.cross and s.causal for s in self.decoder.layers):
            raise BadInput("every decoder layer needs cross: true and causal: true")
        if self.decoder is None and isinstance(self.stack, StackSpec) and any(s.cross for s in self.stack.layers):
            raise BadInput("cross: true needs something to look at: put these layers in `decoder` and an encoder in `stack`")
        tokens, head = self.target or self.embedding, self.head
        if head is not None and head.tie and isinstance(tokens, TokenSpec):
            width = self.decoder.width if self.decoder is not None else self.stack.width
            if (head.size or width) != (tokens.size or width):
                raise BadInput(
                    f"a tied head needs head.size {tokens.size}, the size of the embedding's vectors; it is {head.size or width}"
                )

    def _check_filters(self) -> None:
        """Filters read transformer layers that are there."""
        if self.filters is None:
            return
        if not isinstance(self.stack, StackSpec) or self.decoder is not None:
            raise BadInput(
                "filters read the layers of one stack of transformer layers; this model has others: drop them (edit: drop-filters)"
            )
        if max(self.filters.layers) >= self.stack.depth:
            raise BadInput(
                f"filters read layer {max(self.filters.layers)}; the stack has layers 0 to {self.stack.depth - 1}: "
                "drop the filters first (edit: drop-filters)"
            )

    def _check_patches(self, embedding: Any) -> None:
        """Patches go to transformer layers, and what needs them finds them."""
        layers = self.stack.layers if isinstance(self.stack, StackSpec) else ()
        on_grid = any(layer.position in ("grid", "grid_shared") for layer in layers)
        pool = self.head.pool if self.head is not None else "mean"
        if not isinstance(embedding, PatchSpec):
            if on_grid or pool in ("patches", "first_and_patches", "distilled"):
                what = "layers with position grid" if on_grid else f"head.pool {pool}"
                raise BadInput(f"{what} needs the patches of an image: set embedding.kind to patches")
            return
        if isinstance(self.stack, PlainStackSpec):
            raise BadInput("patches go to transformer layers: give stack.layer, or set embedding.kind to pixels or stem")
        if on_grid and embedding.prefix != 1:
            raise BadInput(f"position grid knows patches and one class token; this embedding has {embedding.prefix} tokens before them")
        if pool in ("distilled", "first_and_patches") and embedding.placed < 1 + (pool == "distilled"):
            raise BadInput(f"head.pool {pool} needs embedding.{'distill_token' if pool == 'distilled' else 'class_token'}")
        if self.head is not None and self.head.kind == "lm":
            raise BadInput("a head of kind lm scores tokens and this model reads images: set head.kind to classifier")

    def _check_sound(self, embedding: Any) -> None:
        """Sound goes to transformer layers, and to words only through a decoder or a classifier."""
        if not isinstance(embedding, WaveSpec | MelSpec):
            return
        if isinstance(self.stack, PlainStackSpec):
            raise BadInput("sound goes to transformer layers: give stack.layer")
        if self.target is None and (self.decoder is not None or (self.head is not None and self.head.kind == "lm")):
            raise BadInput(
                "a decoder or a head of kind lm needs words, and this model reads sound: give target, or set head.kind to classifier"
            )

    def _check_graph(self, embedding: Any) -> None:
        """Graphs go to layers that read their edges, and from there to the parameters of the network that they describe."""
        layers = self.stack.layers if isinstance(self.stack, StackSpec) else ()
        reads, makes = isinstance(embedding, GraphSpec), self.head is not None and self.head.kind == "parameters"
        if makes and not reads:
            raise BadInput("a head of kind parameters needs the graph of a network: set embedding.kind to graph")
        if not reads:
            return
        if isinstance(self.stack, PlainStackSpec) or any(layer.position != "graph" or layer.causal for layer in layers):
            raise BadInput("nodes of a graph go to transformer layers that read its edges: set stack.layer.position to graph")
        if len({layer.heads for layer in layers}) > 1:
            raise BadInput("all layers share one bias for the edges of a graph, so they have the same number of heads")
        if self.stack.width % 4 or self.stack.depth < 1:
            raise BadInput(f"graphs need a stack of at least one layer and a width that is a multiple of 4; it is {self.stack.width}")
        if self.head is not None and not makes:
            raise BadInput(f"nodes of a graph become parameters: set head.kind to parameters (it is {self.head.kind})")

    def _check_pixels(self, embedding: PixelSpec | StemSpec) -> None:
        """Images as they are go to convolutions, flattened ones to dense layers, and either to classes."""
        if isinstance(self.stack, StackSpec):
            raise BadInput("pixels go to convolutional or dense layers: give stack.layers, or set embedding.kind to patches or tokens")
        dense = self.stack.layers[0].kind == "dense"
        if isinstance(embedding, StemSpec):
            if dense or self.stack.inputs not in (None, embedding.width):
                raise BadInput(
                    f"a stem makes maps of {embedding.width} channels: it needs convolutional layers, and stack.inputs of that number"
                )
        elif embedding.flatten != dense:
            raise BadInput(
                f"{'dense layers read vectors' if dense else 'convolutions read maps'}: set embedding.flatten to {str(dense).lower()}"
            )
        if self.head is not None and self.head.kind == "lm":
            raise BadInput("a head of kind lm scores tokens and this model reads images: set head.kind to classifier")

    @property
    def pooling(self) -> str:
        """How positions become one vector: as the head says, or without a head the model.

        Raises:
            BadInput: the checkpoint that the model came from has a way that is not known here.
        """
        how = self.head.pool if self.head is not None else self.pool
        if how is None:
            raise BadInput(UNKNOWN_POOLING)
        return how

    @property
    def causal(self) -> bool:
        """Whether the model can continue a text token by token."""
        top = self.decoder or self.stack
        return isinstance(top, StackSpec) and all(s.causal for s in top.layers)

    def with_vocab(self, vocab: int) -> ModelSpec:
        """This spec with the vocabulary sizes it leaves open filled in."""

        def fill(e: Any) -> Any:
            return dataclasses.replace(e, vocab=vocab) if isinstance(e, TokenSpec) and e.vocab is None else e

        return dataclasses.replace(self, embedding=fill(self.embedding), target=fill(self.target))


@dataclass(frozen=True)
class TwoTowersSpec:
    """Two models that make vectors of one size, of texts and of images, to be compared: CLIP.

    Attributes:
        text, image: the towers, each with a head of kind projection.
    """

    text: ModelSpec
    image: ModelSpec

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        sizes = [tower.head.size if tower.head is not None and tower.head.kind == "projection" else None for tower in self.towers]
        if None in sizes or len(set(sizes)) > 1:
            raise BadInput(f"both towers need a head of kind projection and of one size; their sizes are {sizes[0]} and {sizes[1]}")
        if not isinstance(self.text.embedding, TokenSpec) or isinstance(self.image.embedding, TokenSpec):
            raise BadInput("the text tower reads tokens and the image tower images")

    @property
    def towers(self) -> tuple[ModelSpec, ModelSpec]:
        return self.text, self.image

    @property
    def head(self) -> None:
        """The towers' heads are their own."""
        return None

    @property
    def causal(self) -> bool:
        """It continues nothing."""
        return False

    @property
    def stack(self) -> StackSpec:
        """Raises BadInput: there are two."""
        raise BadInput("this model has two towers: work on model.text or model.image, and put it back with model.with_towers(...)")

    embedding = decoder = target = stack


def model_spec(data: dict[str, Any]) -> Any:
    """A `ModelSpec` (or a `TwoTowersSpec`) from plain data (a job file, `model.json`). Raises pydantic's ValidationError."""
    return TypeAdapter(TwoTowersSpec if isinstance(data, dict) and {"text", "image"} & data.keys() else ModelSpec).validate_python(data)


def spec_data(spec: ModelSpec | TwoTowersSpec) -> dict[str, Any]:
    """The plain data that `model_spec` reads back."""
    return dataclasses.asdict(spec)
