"""Running the layers of a network that is not ours along a path: skipped, repeated, reordered.

The network is called as always, so whatever it does before and after its layers stays as it is. Its layers hand the stream on
untouched and remember what else they were called with; the last of them then runs the path.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import BadInput

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache")
"""Names under which layers are handed their keys and values of earlier positions."""


@dataclass
class Call:
    """One call of one layer: what it was given, and what it made."""

    layer: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: Any = None

    @property
    def stream(self) -> Tensor:
        return stream_of(self.args, self.kwargs)

    @property
    def out(self) -> Tensor:
        return self.made[0] if isinstance(self.made, tuple) else self.made

    def given(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with another stream, and without a cache: a repeated layer would find its own first visit in it."""
        old = self.stream
        args = tuple(x if a is old else a for a in self.args)
        return args, {k: x if v is old else None if k in CACHES else v for k, v in self.kwargs.items()}


def stream_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The residual stream among a layer's arguments: the first tensor."""
    return next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))


def run_path(module: nn.Module, layers: Sequence[nn.Module], batch: Mapping[str, Any], path: Sequence[int]) -> Any:
    """What `module(**batch)` returns when its layers run in the order `path`, gradients included.

    The network runs twice: once as it is and without gradients, to see how its layers are called, and once along the path.

    Raises:
        BadInput: the path names a layer that is not there, or the network is no chain of layers that may be run in another order; the
            message says where it breaks.
    """
    bad = [i for i in path if not 0 <= i < len(layers)]
    if bad or not layers:
        raise BadInput(f"path {list(path)} names layer {bad[0] if bad else 0}; this network has {len(layers)} layers, counted from 0")
    named = dict(batch)
    if "use_cache" in inspect.signature(module.forward).parameters:
        named.setdefault("use_cache", False)
    seen = _seen(module, layers, named)
    _check_chain(seen, len(layers))
    _check_shapes(seen, path)
    return _ran(module, layers, named, path, seen)


def _seen(module: nn.Module, layers: Sequence[nn.Module], named: dict[str, Any]) -> list[Call]:
    """Every call of a layer in an ordinary pass, in order."""
    calls: list[Call] = []

    def watch(i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(Call(i, args, kwargs))
            here = calls[-1]
            here.made = forward(*args, **kwargs)
            return here.made

        return call

    with _forwards(layers, watch), torch.no_grad():
        module(**named)
    return calls


def _ran(module: nn.Module, layers: Sequence[nn.Module], named: dict[str, Any], path: Sequence[int], seen: list[Call]) -> Any:
    calls: dict[int, Call] = {}
    real = [layer.forward for layer in layers]

    def hand_on(i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[i] = Call(i, args, kwargs)
            x = calls[i].stream
            if i == len(layers) - 1:
                for p in path:
                    given, by_name = calls[p].given(x)
                    made = real[p](*given, **by_name)
                    x = made[0] if isinstance(made, tuple) else made
            like = seen[i].made
            return (x, *(None for _ in like[1:])) if isinstance(like, tuple) else x

        return call

    with _forwards(layers, hand_on):
        return module(**named)


@contextlib.contextmanager
def _forwards(layers: Sequence[nn.Module], change: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Every layer's `forward` replaced inside the block."""
    own = [layer.__dict__.get("forward") for layer in layers]
    for i, layer in enumerate(layers):
        layer.__dict__["forward"] = change(i, layer.forward)
    try:
        yield
    finally:
        for layer, old in zip(layers, own, strict=True):
            if old is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = old


def _check_chain(seen: list[Call], depth: int) -> None:
    """Refuse networks whose layers do not run once each in order, or hand each other more than the stream."""
    order = [call.layer for call in seen]
    if order != list(range(depth)):
        raise BadInput(f"its layers run in the order {order[:12]}, not once each from the bottom: a path means nothing here")
    for below, above in zip(seen, seen[1:], strict=False):
        where = f"between layers {below.layer} and {above.layer}"
        if above.stream is not below.out:
            raise BadInput(
                f"something stands {where} (another stack, a change of resolution): only a single chain of layers runs along a path"
            )
        extras = [t for t in (below.made[1:] if isinstance(below.made, tuple) else ()) if isinstance(t, Tensor)]
        given = [*above.args, *above.kwargs.values()]
        if any(e is g for e in extras for g in given):
            name = next((k for k, v in above.kwargs.items() if any(v is e for e in extras)), "a tensor")
            raise BadInput(f"{where} more is handed on than the stream ({name}): these layers cannot be skipped or repeated")


def _check_shapes(seen: list[Call], path: Sequence[int]) -> None:
    """Refuse a path on which a layer would get a stream of another shape than it was made for."""
    shape = seen[0].stream.shape
    for i in path:
        if seen[i].stream.shape != shape:
            raise BadInput(f"on path {list(path)} layer {i} would get {tuple(shape)}; it takes {tuple(seen[i].stream.shape)}")
        shape = seen[i].out.shape
    if shape != seen[-1].out.shape:
        raise BadInput(f"path {list(path)} ends with {tuple(shape)}; what follows takes {tuple(seen[-1].out.shape)}")
