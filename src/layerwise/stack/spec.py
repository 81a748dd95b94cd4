"""What a layer can be (its parts: `parts_spec`), and how a stack of layers is described: plain data, no tensors.

`StackSpec(depth, width, layer, overrides)` is one layer description plus overrides keyed by index or slice, so a
method that treats depths differently (Mix-LN, Zebra's striped windows, per-layer widths after pruning) is a
configuration and not a class. `StackSpec.layers` resolves it to one complete `LayerSpec` a layer.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from layerwise.complaint import FORBID
from layerwise.errors import BadInput
from layerwise.stack.parts_spec import CacheSpec, LinearSpec, RopeScaling, RouterSpec
from layerwise.table import nearest

Placement = Literal["pre", "post", "sandwich", "deepnorm", "lns"]
Norm = Literal["rmsnorm", "rmsnorm_zero", "layernorm"]
Position = Literal["none", "rotary", "alibi", "relative", "grid", "grid_shared", "graph"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "swiglu", "geglu", "geglu_tanh"]

_SLICE = re.compile(r"^(-?\d+)?(:(-?\d+)?){0,2}$")


@dataclass(frozen=True)
class LayerSpec:
    """Everything a transformer layer can be. None means: filled in from the stack when it is resolved.

    Attributes:
        width: size of the residual stream.
        mixer: what moves information between positions; an entry of `layerwise.stack.layer.MIXERS`.
        heads: query heads. kv_heads: key/value heads (None: as many; fewer: grouped-query). head_dim: size of a head.
        causal: a position sees itself and earlier ones only.
        window: a position sees keys less than `window` positions away (None: all).
        cross: a cross-attention sub-layer over `Context.memory` stands between mixer and feed-forward.
        position: how attention knows positions: rotary, ALiBi, T5's relative buckets, a learned bias for every offset on the grid
            of an image's patches (`grid`: a table of its own, `grid_shared`: the stack's), the edges of a graph, or not at all.
        grid: (rows, columns) of patches that the table of `position: grid` is made for; other sizes are interpolated.
        rope_theta: base of the rotary frequencies. rope_scaling: how they are stretched (None: not).
        rotary_dim: rotary positions turn this many of a head's dimensions, the first ones (None: all).
        attention_scale: what scores are multiplied by before the softmax (None: 1/sqrt(head_dim); T5 uses 1).
        qkv_bias, out_bias, ffn_bias: biases of the linears. key_bias: of the keys' (None: as qkv_bias; it moves all scores of a
            query alike, so BEiT and Whisper have none). qk_norm: RMSNorm of every query and key head.
        ffn: activation of the feed-forward; `swiglu`, `geglu` and `geglu_tanh` are gated. ffn_width: its inner size (None: 4x width,
            or 8/3 of it rounded up to a multiple of 8 for the gated ones, which keeps the parameter count).
        norm, norm_eps, norm_bias: the normalization; its bias exists for LayerNorm only. `rmsnorm_zero` multiplies by
            1 + weight, so that its weight starts at zero (Gemma).
        placement: where the norms stand around each sub-layer, see `layerwise.nn.residual`.
        parallel: mixer and feed-forward read the same stream and are added together, x + F(N1(x)) + G(N2(x)), instead of
            one after the other (GPT-J, GPT-NeoX).
        residual_scale: DeepNorm's alpha (None: (2 depth)^(1/4) for deepnorm, otherwise 1).
        layer_scale: initial value of a trained gain on every sub-layer's output, one a dimension (None: no such gain; CaiT).
        norm_gain: initial gain of the norms (None: 1/sqrt(index + 1) for lns, otherwise 1).
        head_scale: a learned factor for every attention head, `before` the output projection, or `after` it on as many groups of
            channels. mixer_norm: a norm on the mixer's output before it joins the stream. ffn_norm: a norm inside the feed-forward,
            after the activation. residual_gain: learned factors, one a channel, on the stream beside the feed-forward.
            These four are NormFormer's HeadScale, post-attention norm, FFN norm and ResScale.
        stream_gate: a learned factor on the stream, one a layer; see `layerwise.nn.gates`. `gpas` lets gradients pass as if
            nothing were scaled, `scale` does not.
        dropout: on the output of every sub-layer. attention_dropout: on the attention probabilities.
        drop: probability that a sample skips this layer in training (stochastic depth).
        router: decides what of the layer runs (None: all of it); see `layerwise.nn.routers`.
        added: an edit put this layer into a trained model (expand); the policy freeze can leave such layers alone trainable.
        estimator_rank: for binary-attention: rank of its full-precision estimates (0: none).
        linears: role (`q k v o gate up down`, `cross.q` ...) -> how that matrix is stored; absent means dense, and `*` stands for all
            roles of the layer that are not named.
        cache: how keys and values are kept in decoding (None: all of them, as they are).
    """

    width: int | None = None
    mixer: str = "attention"
    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    causal: bool = False
    window: int | None = None
    cross: bool = False
    position: Position = "none"
    grid: tuple[int, int] | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    attention_scale: float | None = None
    qkv_bias: bool = False
    key_bias: bool | None = None
    out_bias: bool = False
    qk_norm: bool = False
    ffn: Activation = "gelu"
    ffn_width: int | None = None
    ffn_bias: bool = False
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-6
    norm_bias: bool = True
    placement: Placement = "pre"
    parallel: bool = False
    residual_scale: float | None = None
    layer_scale: float | None = None
    norm_gain: float | None = None
    head_scale: Literal["before", "after"] | None = None
    mixer_norm: bool = False
    ffn_norm: bool = False
    residual_gain: bool = False
    stream_gate: Literal["gpas", "scale"] | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop: float = 0.0
    router: RouterSpec | None = None
    added: bool = False
    estimator_rank: int = 1
    linears: dict[str, LinearSpec] = field(default_factory=dict)
    cache: CacheSpec | None = None

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        for name in ("width", "heads", "kv_heads", "head_dim", "ffn_width", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} must be at least 1; it is {value}")
        if self.norm_eps < 0 or self.rope_theta <= 0:
            raise BadInput(f"norm_eps is >= 0 and rope_theta > 0; got {self.norm_eps} and {self.rope_theta}")
        for name in ("dropout", "attention_dropout", "drop"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"{name} is a probability in [0, 1); it is {getattr(self, name)}")
        if (self.grid is not None) != (self.position in ("grid", "grid_shared")) or min(self.grid or (1,)) < 1:
            raise BadInput(
                f"grid gives the rows and columns of patches for position grid or grid_shared; got {self.grid} for {self.position}"
            )
        kv = self.kv_heads or self.heads
        if self.heads % kv:
            raise BadInput(f"heads ({self.heads}) must be a multiple of kv_heads ({kv})")
        if self.parallel and (self.placement in ("post", "deepnorm") or self.cross):
            raise BadInput("parallel layers have their norms before each branch and no cross-attention: use placement pre, lns or sandwich")
        skips = self.router is not None and self.router.decides == "ffn"
        if skips and (self.placement in ("post", "deepnorm") or self.parallel or self.residual_gain or self.stream_gate):
            raise BadInput(
                "a router of tokens skips what the feed-forward adds to the stream: it needs placement pre, lns or sandwich, without parallel, "
                "residual_gain and stream_gate"
            )
        self._check_gains(kv)
        self._check_cache(kv)

    def _check_cache(self, kv: int) -> None:
        """Refuse a cache that the layer cannot have."""
        shrunk = {role for role, linear in self.linears.items() if linear.kind == "shrunk"}
        if shrunk - {"k", "v"}:
            raise BadInput(f"linears of kind shrunk are those of keys and values, k and v; got one at {min(shrunk - {'k', 'v'})}")
        if self.cache is None:
            return
        if self.mixer != "attention" or not self.causal:
            raise BadInput(f"a cache is for causal attention; mixer is {self.mixer} and causal {str(self.causal).lower()}")
        if self.cache.kind == "low-rank" and shrunk != {"k", "v"}:
            raise BadInput("a cache of kind low-rank needs linears k and v of kind shrunk: use edit: shrink-cache")
        if self.cache.kind == "heavy" and (self.position in ("alibi", "relative") or self.window is not None):
            raise BadInput(
                "a cache of kind heavy keeps other positions for every head: it goes with rotary or learned positions and no window"
            )
        if self.cache.bits is not None:
            rank = self.linears["v"].rank or 0
            if rank % (self.cache.group or kv):
                raise BadInput(f"cache.bits: {rank} channels of a value do not divide into groups: set cache.group to a divisor of {rank}")

    def _check_gains(self, kv: int) -> None:
        """Refuse extra norms and gains where they would mean nothing, or something else."""
        if self.mixer_norm and self.placement == "sandwich":
            raise BadInput("placement sandwich has a norm on the mixer's output already: leave mixer_norm out")
        if self.residual_gain and self.parallel:
            raise BadInput("residual_gain scales the stream beside the feed-forward, and parallel layers have no such place: leave it out")
        if self.head_scale and self.mixer != "attention":
            raise BadInput(f"head_scale scales attention heads; mixer '{self.mixer}' has none")
        if self.head_scale == "after" and kv != self.heads:
            raise BadInput(
                f"head_scale after: with {self.heads} heads on {kv} key/value heads, groups of channels mean no head: use before"
            )

    @property
    def gated(self) -> bool:
        """Whether the feed-forward multiplies its activation by a second projection."""
        return self.ffn in ("swiglu", "geglu", "geglu_tanh")

    def resolve(self, index: int, depth: int, width: int) -> LayerSpec:
        """This spec with every None that has a rule filled in, as layer `index` of `depth`."""
        width = self.width or width
        if self.head_dim is None and width % self.heads:
            divisors = [h for h in range(1, min(width, 4 * self.heads) + 1) if width % h == 0]
            best = min(divisors, key=lambda h: abs(h - self.heads))
            raise BadInput(f"heads ({self.heads}) does not divide width ({width}) in layer {index}: use heads={best}, or set head_dim")
        head_dim = self.head_dim or width // self.heads
        if self.position == "rotary" and self.rotary_dim is None and head_dim % 2:
            raise BadInput(f"rotary positions need an even head size; width {width} / heads {self.heads} gives {head_dim}")
        if self.head_scale == "after" and width % self.heads:
            raise BadInput(f"head_scale after cuts width {width} into {self.heads} groups, which does not divide it: use before")
        if self.rotary_dim is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= head_dim):
            raise BadInput(f"rotary_dim must be even and at most the head size {head_dim}; it is {self.rotary_dim}")
        ffn_width = self.ffn_width or (-(-8 * width // 24) * 8 if self.gated else 4 * width)
        scale, gain = self.residual_scale, self.norm_gain
        if scale is None:
            scale = (2 * depth) ** 0.25 if self.placement == "deepnorm" else 1.0
        if gain is None:
            gain = (index + 1) ** -0.5 if self.placement == "lns" else 1.0
        linears = self.linears
        if "*" in linears:
            present = ["q", "k", "v", "o", *(["gate"] if self.gated else []), "up", "down"]
            present += ["cross.q", "cross.k", "cross.v", "cross.o"] if self.cross else []
            linears = {**dict.fromkeys(present, linears["*"]), **{r: s for r, s in linears.items() if r != "*"}}
        return dataclasses.replace(
            self,
            width=width,
            linears=linears,
            kv_heads=self.kv_heads or self.heads,
            head_dim=head_dim,
            ffn_width=ffn_width,
            residual_scale=scale,
            norm_gain=gain,
        )


def indices(key: str | int, depth: int) -> range:
    """The layers that an override's key names: an index (`3`, `-1`) or a slice (`0:3`, `::4`).

    Raises:
        BadInput: the key is neither, or names no layer of a stack this deep.
    """
    text = str(key).strip()
    if not text or not _SLICE.match(text):
        raise BadInput(f"layer key '{key}' is neither an index nor a slice: write 3, -1, '0:3' or '::4'")
    if ":" not in text:
        index = int(text)
        if not -depth <= index < depth:
            raise BadInput(f"layer {index} is out of range: the stack has layers 0 to {depth - 1}")
        return range(index % depth, index % depth + 1)
    parts = [int(p) if p else None for p in text.split(":")]
    for bound in parts[:2]:
        if bound is not None and not -depth <= bound <= depth:
            raise BadInput(f"slice '{text}' is out of range: the stack has layers 0 to {depth - 1}")
    if len(parts) == 3 and parts[2] == 0:
        raise BadInput(f"slice '{text}' has step 0")
    chosen = range(depth)[slice(*parts)]
    if not chosen:
        raise BadInput(f"slice '{text}' names no layer of a stack with layers 0 to {depth - 1}")
    return chosen


DEEPEST = 10_000
"""A description that asks for more layers is damaged; building it would take for ever."""


@dataclass(frozen=True)
class StackSpec:
    """A stack of `depth` layers, all like `layer` except where `overrides` says otherwise.

    Attributes:
        depth: number of layers (0 is allowed: what is left after all layers were dropped).
        width: size of the residual stream.
        layer: what a layer is.
        overrides: index or slice -> fields of `LayerSpec` that differ there; later keys win.
        final_norm: a last norm on the stack's output, of the kind that `layer` has.
        init_std: standard deviation of the initial weights.
        scaled_init: initial weights that write into the residual stream are divided by sqrt(2 depth).
        shared: for each layer the one whose weights it has, itself or one below (ALBERT: all zeros); empty: each has its own.
        buckets, max_distance: of T5's relative position bias, shared by all layers with `position: relative`.
    """

    depth: int = 4
    width: int = 128
    layer: LayerSpec = field(default_factory=LayerSpec)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    final_norm: bool = True
    init_std: float = 0.02
    scaled_init: bool = False
    buckets: int = 32
    max_distance: int = 128
    shared: tuple[int, ...] = ()

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if self.depth < 0 or self.width < 1:
            raise BadInput(f"a stack needs depth >= 0 and width >= 1; got depth {self.depth}, width {self.width}")
        if self.depth > DEEPEST:  # before a description is made of every layer
            raise BadInput(f"depth: at most {DEEPEST:,} layers; got {self.depth:,}")
        known = [f.name for f in dataclasses.fields(LayerSpec)]
        for key, changes in self.overrides.items():
            for name in changes:
                if name not in known:
                    raise BadInput(f"overrides '{key}': a layer has no field '{name}'.{nearest(name, known)}")
        if self.init_std < 0:
            raise BadInput(f"init_std must be >= 0; it is {self.init_std}")
        layers = self.layers  # resolving checks every layer
        self._check_relative([s for s in layers if s.position == "relative"])
        self._check_shared()
        shared = {(s.position, s.heads, s.grid) for s in layers if s.position in ("relative", "grid_shared")}
        if len(shared) > 1:
            raise BadInput(
                f"a stack has one shared position bias, so its layers' kinds, heads and grids must agree; got {sorted(map(str, shared))}"
            )

    def _check_shared(self) -> None:
        """Layers that share weights are alike."""
        if not self.shared:
            return
        layers = self.layers
        if len(self.shared) != self.depth:
            raise BadInput(f"shared names a layer for each of {self.depth} layers; it has {len(self.shared)} entries")
        for i, first in enumerate(self.shared):
            if not 0 <= first <= i or self.shared[first] != first:
                raise BadInput(f"shared: layer {i} has the weights of layer {first}, which must be itself or one below with its own")
            if layers[i] != layers[first]:
                raise BadInput(f"shared: layers {first} and {i} cannot have the same weights: they are described differently")

    def _check_relative(self, layers: list[LayerSpec]) -> None:
        """Layers with relative positions share one bias."""
        if not layers:
            return
        kinds = {(s.heads, s.causal) for s in layers}
        if len(kinds) > 1:
            raise BadInput(f"layers with relative positions share one bias, so their heads and causal must agree; got {sorted(kinds)}")
        exact = self.buckets // (2 if layers[0].causal else 4)
        if exact < 1 or self.max_distance <= exact:
            raise BadInput(
                f"relative positions need {2 if layers[0].causal else 4} buckets or more and max_distance above {exact}; "
                f"got buckets {self.buckets}, max_distance {self.max_distance}"
            )

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """One complete spec per layer, bottom first."""
        changes: list[dict[str, Any]] = [{} for _ in range(self.depth)]
        for key, change in self.overrides.items():
            for i in indices(key, self.depth):
                changes[i].update(change)
        return tuple(_replace(self.layer, c).resolve(i, self.depth, self.width) for i, c in enumerate(changes))

    def with_layers(self, layers: Sequence[LayerSpec]) -> StackSpec:
        """The spec whose `layers` are exactly `layers`, and whose final norm stays of its kind. As many and alike share what they shared.

        The layer that needs the fewest overrides is the default, apart from its norm. (The most common value of every field would
        be shorter, but such a layer need not be possible.)
        """
        if not layers:
            return dataclasses.replace(self, depth=0, overrides={}, shared=())
        plain = [{f.name: getattr(s, f.name) for f in dataclasses.fields(s)} for s in layers]
        kept = {name: getattr(self.layer, name) for name in ("norm", "norm_eps", "norm_bias")}
        common = min((p | kept for p in plain), key=lambda base: sum(v != base[k] for p in plain for k, v in p.items()))
        overrides = {str(i): {k: v for k, v in p.items() if v != common[k]} for i, p in enumerate(plain)}
        alike = len(self.shared) == len(layers) and all(layers[i] == layers[first] for i, first in enumerate(self.shared))
        return dataclasses.replace(
            self,
            depth=len(layers),
            layer=LayerSpec(**common),
            overrides={k: v for k, v in overrides.items() if v},
            shared=self.shared if alike else (),
        )


@functools.cache
def _layer_schema() -> TypeAdapter[LayerSpec]:
    return TypeAdapter(LayerSpec)


def _replace(layer: LayerSpec, change: dict[str, Any]) -> LayerSpec:
    """`layer` with `change` applied and type-checked (values may be plain YAML)."""
    if not change:
        return layer
    try:
        return _layer_schema().validate_python({**dataclasses.asdict(layer), **change})
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"override of {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
