"""What training holds in memory, measured on the real objects: parameters, gradients, optimizer state, saved activations.

A tensor counts with the storage it lives in, once, however many views of it there are. So packed weights count packed, a tied
matrix counts once, and a slice that keeps a large storage alive counts whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def _storages(value: Any) -> Iterator[tuple[int, int]]:
    """(identity, bytes) of every storage under `value`: a tensor, or mappings and sequences of them."""
    if isinstance(value, Tensor):
        parts = [getattr(value, name) for name in value.__tensor_flatten__()[0]] if hasattr(value, "__tensor_flatten__") else []
        if parts:  # a wrapper of other tensors has no storage of its own
            yield from _storages(parts)
        else:
            storage = value.untyped_storage()
            yield storage._cdata, storage.nbytes()  # also of storages without memory (fake tensors)
    elif isinstance(value, Mapping):
        yield from _storages(list(value.values()))
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _storages(inner)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in `value` (a tensor, or nested mappings and sequences), each storage once."""
    return sum(dict(_storages(value)).values())


def parameter_bytes(*modules: nn.Module) -> int:
    """Bytes of the parameters and buffers of modules: packed codes and their scales are buffers, and count."""
    return tensor_bytes([[*m.parameters(), *m.buffers()] for m in modules])


def gradient_bytes(*modules: nn.Module) -> int:
    """Bytes of the gradients that are there now."""
    return tensor_bytes([p.grad for m in modules for p in m.parameters() if p.grad is not None])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state; before the first step there are usually none."""
    return tensor_bytes(list(optimizer.state.values()))


def state_floats(optimizer: torch.optim.Optimizer) -> int:
    """Numbers in the tensors of an optimizer's state, step counters (tensors of no dimension) left out."""
    return sum(v.numel() for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor) and v.dim())


class SavedTensors:
    """A context in which autograd's saved tensors are counted for as long as they live.

    Attributes:
        now: bytes saved and not yet freed. peak: the most there were at once.

    So a network whose layers are trained one after the other shows one layer's activations, not the sum of all, and recomputed
    activations count when they are recomputed. What the caller holds itself, a hidden state in a list, is not saved by autograd.

    Args:
        without: tensors that do not count: parameters are saved too, but they are there anyway.
    """

    def __init__(self, without: Iterable[Tensor] = ()) -> None:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self.now = self.peak = 0
        self._ignored = {key for key, _ in _storages(list(without))}
        self._holders: dict[int, int] = {}

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        for key, size in set(_storages(tensor)) if tensor.numel() else ():
            if key in self._ignored:
                continue
            self._holders[key] = self._holders.get(key, 0) + 1
            if self._holders[key] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(held, self._release, key, size).atexit = False
        return held

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= size


class _Held:
    """A saved tensor, and something whose end can be noticed."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(call: Callable[[], Any], without: Iterable[Tensor] = ()) -> int:
    """The most bytes autograd had saved at once while `call` ran (forward alone, or forward and backward).

    Args:
        call: what is measured; its result is dropped afterwards.
        without: tensors that do not count, such as `model.parameters()`.
    """
    with SavedTensors(without) as saved:
        call()
    return saved.peak


class LiveGradients:
    """A context that watches gradients come and go.

    Attributes:
        peak: the most bytes of parameter gradients there were at once. Gradients that are used and freed inside the backward
            pass (per-layer updates) never meet, and that is what it shows.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.peak = 0
        self._now: dict[int, int] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> LiveGradients:
        self._now = {id(p): tensor_bytes(p.grad) for p in self.parameters if p.grad is not None}
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.parameters]
        self.peak = sum(self._now.values())
        return self

    def _arrived(self, parameter: Tensor) -> None:
        # The gradient just made was there, even if a hook before this one has used and freed it already.
        self._now = {id(p): tensor_bytes(p.grad) for p in self.parameters if p.grad is not None}
        self._now.setdefault(id(parameter), parameter.numel() * parameter.element_size())
        self.peak = max(self.peak, sum(self._now.values()))

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
