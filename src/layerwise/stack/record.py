"""Looking inside a forward pass: the only way to get at hidden states and attention maps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput
from layerwise.stack.context import Call, Context
from layerwise.stack.depth import view
from layerwise.stack.path import stream_of
from layerwise.stack.stack import Stack

Which = Sequence[int] | Literal["all"]
Key = TypeVar("Key", bound=Hashable)


@dataclass
class Recorder:
    """Collects what layers saw and made. As an `around` it keeps the stream; attention leaves its maps here itself."""

    keep_hidden: frozenset[int] = frozenset()
    keep_inputs: frozenset[int] = frozenset()
    keep_attention: frozenset[int] = frozenset()
    detach: bool = True
    hidden: dict[int, Tensor] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)

    def wants_attention(self, layer: int) -> bool:
        return layer in self.keep_attention

    def __call__(self, i: int, layer: nn.Module, x: Tensor, ctx: Context, call: Call) -> Tensor:
        if i in self.keep_inputs:
            self.inputs[i] = x.detach() if self.detach else x
        x = call(x, ctx)
        if i in self.keep_hidden:
            self.hidden[i] = x.detach() if self.detach else x
        return x


@dataclass
class Record:
    """What `record` brought back, by layer index.

    Attributes:
        output: what the model returned.
        hidden: output of a layer, (b, s, width). inputs: what went into it. attention: probabilities (b, h, s, keys).
    """

    output: Any
    hidden: dict[int, Tensor]
    inputs: dict[int, Tensor]
    attention: dict[int, Tensor]

    def stream(self) -> list[Tensor]:
        """The residual stream at every boundary: what enters layer 0, then what leaves each layer."""
        return [self.inputs[0], *(self.hidden[i] for i in sorted(self.hidden))]


def record(
    model: nn.Module, batch: Mapping[str, Any], *, hidden: Which = (), inputs: Which = (), attention: Which = (), gradients: bool = False
) -> Record:
    """Run `model` on `batch` and keep the named layers' outputs, inputs and attention maps.

    Fused attention stays fused in layers that are not recorded. Works on layerwise models, and for `hidden` and `inputs`
    on any network whose layers `view` finds. Recorded tensors are detached unless `gradients`.

    Args:
        hidden, inputs, attention: layer indices (negative from the top; of the decoder, where there is one), or "all".

    Raises:
        BadInput: an index is out of range, or attention is asked of a model that is not ours.
    """
    stacks = [s for name in ("decoder", "stack") if isinstance(s := getattr(model, name, None), Stack)]
    ours = bool(stacks)
    depth = stacks[0].depth if ours else view(model).depth
    recorder = Recorder(_which(hidden, depth), _which(inputs, depth), _which(attention, depth), detach=not gradients)
    with torch.set_grad_enabled(gradients):
        output = model(batch, around=(recorder,), recorder=recorder) if ours else _hooked(model, batch, recorder)
    return Record(output, recorder.hidden, recorder.inputs, recorder.attention)


def _which(which: Which, depth: int) -> frozenset[int]:
    if which == "all":
        return frozenset(range(depth))
    bad = [i for i in which if not -depth <= int(i) < depth]
    if bad:
        raise BadInput(f"cannot record layer {bad[0]}: the model has layers 0 to {depth - 1}")
    return frozenset(int(i) % depth for i in which)


def _hooked(model: nn.Module, batch: Mapping[str, Any], recorder: Recorder) -> Any:
    """Record a foreign network, or one of several stacks, through forward hooks on the layers that `view` finds."""
    if recorder.keep_attention:
        if any(isinstance(part, Stack) for part in model.modules()):
            raise BadInput("attention maps are recorded one tower at a time: record(model.text, ...) or record(model.image, ...)")
        raise BadInput("attention maps can be recorded on layerwise models only: load the checkpoint with layerwise.load first")

    def hook(i: int):
        def leave(module: nn.Module, given: tuple, named: dict[str, Any], made: Any) -> None:
            if i in recorder.keep_inputs:
                stream = stream_of(given, named)
                recorder.inputs[i] = stream.detach() if recorder.detach else stream
            if i in recorder.keep_hidden:
                tensor = made[0] if isinstance(made, tuple) else made
                recorder.hidden[i] = tensor.detach() if recorder.detach else tensor

        return leave

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(view(model).layers)]
    try:
        return view(model).run(batch)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def inputs_of(modules: Mapping[Key, nn.Module], see: Callable[[Key, Tensor], None]) -> Iterator[None]:
    """Inside the block `see(key, x)` is called with what a module reads, each time one of them is run."""

    def watch(key: Key) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            see(key, given[0])

        return hook

    handles = [module.register_forward_pre_hook(watch(key)) for key, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
