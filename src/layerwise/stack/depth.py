"""Where the layers of any network are, and how deep every parameter of it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerwise.stack.path import run_path
from layerwise.stack.stack import Stack

LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class View:
    """A network seen as a stack of layers.

    Attributes:
        module: the network.
        names: dotted name of each layer, bottom first.
        layers: the layer modules.
    """

    module: nn.Module
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]

    @property
    def depth(self) -> int:
        return len(self.layers)

    def run(self, batch: Mapping[str, Any], *, path: Sequence[int] | None = None) -> Any:
        """What the network makes of `batch`; with a `path`, its layers run in that order (skipped, repeated).

        Args:
            batch: the network's keyword arguments; for layerwise models the batch itself.

        Raises:
            BadInput: its layers cannot run in another order; the message says why.
        """
        if any(isinstance(part, Stack) for part in self.module.modules()):
            return self.module(batch, path=path)
        return self.module(**batch) if path is None else run_path(self.module, self.layers, batch, path)

    def depth_of(self) -> dict[str, int]:
        """Parameter name -> depth: -1 before the first layer, i inside layer i, `depth` after the last."""
        depths: dict[str, int] = {}
        met: dict[int, int] = {}
        below = -1
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            inside = next((i for i, layer in enumerate(self.names) if name.startswith(layer + ".")), None)
            # What is registered between two layers (an encoder's last norm before a decoder) lies with the layer below it,
            # and a tensor that has several names lies where it is met first.
            below = below if inside is None else inside
            depths[name] = met.setdefault(id(parameter), below)
        for name in reversed(depths if self.depth else {}):
            if any(name.startswith(layer + ".") for layer in self.names):
                break
            if depths[name] == self.depth - 1:
                depths[name] = self.depth
        return depths


def view(module: nn.Module) -> View:
    """Find the layers of a network: those of our stacks; else the repeated blocks; else the modules that own weights, in order.

    Repeated blocks are the children of a list of like modules (`nn.ModuleList`, `nn.Sequential`). A list of stages that
    hold such lists themselves (ResNet, Swin) is opened; a list inside a block (experts, heads) is not. A network may have one
    block only (BERT with one layer), but a single list of operations is no block.
    """
    stacks = [(name, part.depth) for name, part in module.named_modules() if isinstance(part, Stack)]
    names = [f"{name}.layers.{i}".lstrip(".") for name, depth in stacks for i in range(depth)] or _blocks(module, "")
    modules = dict(module.named_modules(remove_duplicate=False))  # a tied layer has several names
    if not stacks and (not names or (len(names) == 1 and isinstance(modules[names[0]], LISTS))):
        names = [n for n, m in module.named_modules() if n and any(True for _ in m.parameters(recurse=False))]
    return View(module, tuple(names), tuple(modules[n] for n in names))


def depth_of(module: nn.Module) -> dict[str, int]:
    """Parameter name -> layer index for any network: -1 before the layers (embedding), their number after them (head)."""
    return view(module).depth_of()


def _blocks(module: nn.Module, path: str) -> list[str]:
    """Dotted names of the repeated blocks in `module`, which is called `path`, in registration order."""
    repeated = isinstance(module, LISTS) and _repeats(module)
    found: list[str] = []
    for key, child in module.named_children():
        name = f"{path}.{key}".lstrip(".")
        if key == "parametrizations":  # where torch keeps how a weight is computed (weight norm): no layer
            continue
        if not repeated:
            found += _blocks(child, name)
        else:
            found += (_blocks(child, name) if _is_stage(child) else []) or [name]
    return found


def _repeats(children: nn.Module) -> bool:
    """Whether a list holds several modules of one kind that own weights and are more than single operations."""
    kinds = [type(c) for c in children.children() if any(True for _ in c.parameters())]
    compound = [k for c, k in zip(children.children(), kinds, strict=False) if any(True for _ in c.children())]
    return bool(compound) and len(set(kinds)) == 1 and len(kinds) == len(list(children.children()))


def _is_stage(block: nn.Module) -> bool:
    """A stage groups blocks: it is a list itself, or is called a stage, or a list of blocks holds most of its weights."""
    if isinstance(block, LISTS) or "Stage" in type(block).__name__:
        return True
    named = {n: c for n, c in block.named_children() if isinstance(c, LISTS) and n in ("blocks", "layers")}
    return bool(named)
