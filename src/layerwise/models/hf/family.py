"""What a Hugging Face family is to layerwise: its config read and written, and one table of names used in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.embed.spec import PatchSpec, TokenSpec
from layerwise.errors import BadInput
from layerwise.models.hf.layouts import JOINED, Layout
from layerwise.models.model import make_model
from layerwise.models.plain_spec import PlainStackSpec
from layerwise.models.spec import ModelSpec, TwoTowersSpec
from layerwise.stack.spec import StackSpec

LEAVES = ("", ".weight", ".bias", ".running_mean", ".running_var", ".num_batches_tracked")
"""What a module's name may be followed by; a rule that names a tensor itself has none of them."""
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Their names of activations that are not gated -> ours."""


@dataclass(frozen=True)
class Rule:
    """Which module (or single parameter) of theirs holds the numbers of which of ours.

    Attributes:
        ours: dotted names in our model; several make up one of theirs (fused query, key, value). `*` is the layer's number.
        theirs: dotted name in their checkpoint.
        layout: how ours make up theirs.
        also: further names under which the same numbers may stand.
        when: which models the rule is for (None: all).
        unused: names that theirs writes too but never uses; they get a copy.
    """

    ours: tuple[str, ...]
    theirs: str
    layout: Layout = JOINED
    also: tuple[str, ...] = ()
    when: Callable[[ModelSpec], bool] | None = None
    unused: tuple[str, ...] = ()


def names(table: Mapping[str, str], ours: str = "", theirs: str = "", layout: Layout = JOINED) -> tuple[Rule, ...]:
    """One rule for each entry, `ours` and `theirs` being what all names begin with."""
    return tuple(Rule((ours + a,), theirs + b, layout) for a, b in table.items())


@dataclass(frozen=True)
class Pair:
    """A rule applied to one parameter: tensors of ours and the tensor of theirs that holds the same numbers."""

    ours: tuple[str, ...]
    theirs: str
    layout: Layout
    also: tuple[str, ...]
    unused: tuple[str, ...]
    heads: int

    def pack(self, state: Mapping[str, Tensor]) -> Tensor:
        """Ours to theirs."""
        return self.layout.pack([state[name] for name in self.ours], self.heads)

    def unpack(self, tensor: Tensor, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Theirs to ours; `shapes` holds tensors (without values) of the shapes that ours have.

        Raises:
            BadInput: theirs has another shape.
        """
        expected = tuple(self.pack(shapes).shape)
        if tuple(tensor.shape) != expected:
            raise BadInput(f"{self.theirs} has shape {tuple(tensor.shape)}; the config makes it {expected}")
        parts = self.layout.unpack(tensor, [len(shapes[name]) if shapes[name].dim() else 1 for name in self.ours], self.heads)
        return dict(zip(self.ours, parts, strict=True))


@dataclass(frozen=True)
class Family:
    """One family of Hugging Face models.

    Attributes:
        name: its `model_type`.
        read: (their config, whether there is a vocabulary head) -> our description.
        write: our description -> their config, or the nearest there is: what does not read back as it was cannot be held. It
            names every key that `read` looks at, so that nothing old remains in force.
        rules: the table of names.
        lm: architectures with a vocabulary head; the first is written. base: those without a head.
        prefix: what the names of everything but the head begin with, and what a checkpoint of the first of `base` leaves out.
        seq2seq: an encoder and a decoder.
        renamed: endings of names in old checkpoints -> their present form.
        ignored: endings of names that hold nothing of their own.
        carried: beginnings of names of tensors that our model has no use for; they are kept and written out again.
        shared: our second name of a tensor -> its first.
        defaults: config keys that a model which did not come from this family gets beside those of `write`.
        classifier: architectures with a head for classes, or a projection; the first is written.
        reads: what describes its embedding (both towers: `TwoTowersSpec`). stack: what describes its layers.
        place: what stands for `*` in their names, for each layer (None: its number).
    """

    name: str
    read: Callable[[dict[str, Any], bool], ModelSpec]
    write: Callable[[ModelSpec], dict[str, Any]]
    rules: tuple[Rule, ...]
    lm: tuple[str, ...] = ()
    base: tuple[str, ...] = ()
    prefix: str = ""
    seq2seq: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    classifier: tuple[str, ...] = ()
    reads: type = TokenSpec
    stack: type = StackSpec
    place: Callable[[ModelSpec], Sequence[str]] | None = None

    @property
    def head_names(self) -> tuple[str, ...]:
        """Their names of the head's matrix; where it is tied, the token embedding may stand under them too."""
        return tuple(name for rule in self.rules if rule.ours == ("head.weight",) for name in (rule.theirs, *rule.also))

    def scored(self, spec: ModelSpec) -> str:
        """Our name of the token vectors that a tied head multiplies by."""
        name = "embedding.tokens.weight" if spec.target is None else "target.tokens.weight"
        return dict(self.shared).get(name, name)

    @property
    def headed(self) -> tuple[str, ...]:
        """Architectures with a head."""
        return (*self.lm, *self.classifier)

    def pairs(self, spec: ModelSpec, shapes: Mapping[str, Tensor] | None = None) -> list[Pair]:
        """The table of names for a description, in the order of the rules.

        Args:
            shapes: `shapes_of(spec)`, if it is at hand.
        """
        shapes = shapes_of(spec) if shapes is None else shapes
        places = None if self.place is None else self.place(spec)
        found: list[Pair] = []
        for rule in self.rules:
            if rule.when is not None and not rule.when(spec):
                continue
            side = _side(spec, rule.ours[0])
            # `layers` resolves every layer anew, so it is asked for once a rule, not once a layer.
            heads = getattr(side.layers[0], "heads", 1) if side is not None and side.depth else 1
            for i in range(side.depth if side is not None else 0) if "*" in rule.ours[0] else (0,):
                found += _applied(rule, str(i), str(i) if places is None else places[i], heads, shapes)
        if is_tied(spec):
            found = [dataclasses.replace(p, also=(*p.also, *self.head_names)) if self.scored(spec) in p.ours else p for p in found]
        named = {name for pair in found for name in pair.ours} | {second for second, _ in self.shared}
        if self.place is not None:  # where several layers have one place, the lowest of them stands there
            found = list({pair.theirs: pair for pair in reversed(found)}.values())[::-1]
        if nameless := sorted(shapes.keys() - named):
            raise BadInput(f"{self.name} checkpoints have no name for {nameless[0]}")
        return found


def layer_ties(spec: ModelSpec | TwoTowersSpec) -> dict[str, str]:
    """Our second name of a tensor that layers share -> its first."""
    ties: dict[str, str] = {}
    if isinstance(spec, TwoTowersSpec):
        return ties
    shared = {side: getattr(getattr(spec, side, None), "shared", ()) for side in ("stack", "decoder")}
    for name in shapes_of(spec) if any(shared.values()) else ():
        side, _, rest = name.partition(".layers.")
        number, _, leaf = rest.partition(".")
        firsts = shared.get(side)
        if firsts and number.isdigit() and firsts[int(number)] != int(number):
            ties[name] = f"{side}.layers.{firsts[int(number)]}.{leaf}"
    return ties


def shapes_of(spec: ModelSpec) -> dict[str, Tensor]:
    """The tensors of a model of this description, without values.

    Raises:
        BadInput: its sizes are beyond what a tensor can have.
    """
    try:
        with torch.device("meta"):
            return make_model(spec).state_dict()
    except (TypeError, RuntimeError, OverflowError) as error:
        raise BadInput(f"no model of these sizes can be built: {str(error).splitlines()[0]}") from error


def _side(spec: ModelSpec | TwoTowersSpec, name: str) -> StackSpec | PlainStackSpec | None:
    """The stack that a name of ours belongs to."""
    if isinstance(spec, TwoTowersSpec):
        return (spec.text if name.startswith("text.") else spec.image).stack
    return spec.decoder if name.startswith("decoder.") else spec.stack


def _applied(rule: Rule, here: str, there: str, heads: int, shapes: Mapping[str, Tensor]) -> list[Pair]:
    """A rule's pairs: one for each parameter that the module has, or the one that it names. `here` and `there` stand for `*`."""
    ours = [name.replace("*", here) for name in rule.ours]
    found = []
    for leaf in LEAVES:
        if all(name + leaf in shapes for name in ours):
            theirs, also, unused = (
                tuple(name.replace("*", there) + leaf for name in names) for names in ((rule.theirs,), rule.also, rule.unused)
            )
            found.append(Pair(tuple(name + leaf for name in ours), theirs[0], rule.layout, also, unused, heads))
    return found


def is_tied(spec: ModelSpec) -> bool:
    """Whether the head multiplies by the token embedding itself."""
    return spec.head is not None and spec.head.kind == "lm" and spec.head.tie


def is_untied(spec: ModelSpec) -> bool:
    """Whether it does not."""
    return not is_tied(spec)


def only(config: dict[str, Any], key: str, allowed: tuple[Any, ...], default: Any) -> Any:
    """A config value that must be one of those we can do.

    Raises:
        BadInput: it is another.
    """
    value = config.get(key, default)
    if value not in allowed:
        raise BadInput(f"config.json: {key} is {value!r}; layerwise can do {', '.join(map(repr, allowed))}")
    return value


def read_activation(config: dict[str, Any], key: str, default: str) -> Any:
    """Our name of an activation that is not gated."""
    return ACTIVATIONS[only(config, key, tuple(ACTIVATIONS), default)]


def write_activation(name: str | None) -> str:
    """Their name of one of ours; for a gated one the nearest there is, which reads back as something else."""
    return next((theirs for theirs, ours in ACTIVATIONS.items() if ours == name), "gelu")


def parts_of(spec: ModelSpec | TwoTowersSpec) -> tuple[ModelSpec, ...]:
    """A description's towers, or itself."""
    return spec.towers if isinstance(spec, TwoTowersSpec) else (spec,)


def tokens_of(spec: ModelSpec) -> TokenSpec:
    """The description's embedding, which is known to be of tokens."""
    assert isinstance(spec.embedding, TokenSpec)
    return spec.embedding


def stack_of(spec: ModelSpec) -> StackSpec:
    """The description's stack, which is known to be of transformer layers."""
    assert isinstance(spec.stack, StackSpec)
    return spec.stack


def patches_of(spec: ModelSpec) -> PatchSpec:
    """The description's embedding, which is known to be of patches."""
    assert isinstance(spec.embedding, PatchSpec)
    return spec.embedding


def classes_of(config: dict[str, Any]) -> int:
    """How many classes a config has: its labels are named, or counted, or the two that transformers takes for granted."""
    named = config.get("id2label")
    return len(named) if named else config.get("num_labels", 2)


def pair_of(value: Any) -> tuple[int, int]:
    """A size that is one number or two."""
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def one_of(pair: tuple[int, int]) -> int | list[int]:
    """The same the other way: one number where both are equal."""
    return pair[0] if pair[0] == pair[1] else list(pair)


def stages(count: int) -> dict[str, Any]:
    """The names of so many stages, and that the last is the one that a backbone shows."""
    named = ["stem", *(f"stage{i + 1}" for i in range(count))]
    return {"stage_names": named, "out_features": named[-1:], "out_indices": [count]}
