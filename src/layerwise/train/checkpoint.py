"""The state of a training stage on disk: safetensors and JSON with checksums, whole or absent, never pickle.

Every process writes the rows it holds of sharded tensors into a file of its own; `layout.json` says which rows of which tensor
lie where. Any number of processes can read it back, each the rows that are its own then. Writing goes on in a thread, from a
copy, while training continues.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from layerwise.errors import BadInput, LayerwiseError
from layerwise.files import check_folder, whole_folder, write_json
from layerwise.safetensor import save_tensors
from layerwise.stack.sharding import like_rows, rows_here
from layerwise.train.ranks import Ranks, ranks

KEPT = 2
PARTS_SECONDS = 600.0
"""How long the leader waits for the other processes' files before it gives a checkpoint up."""


class Saver:
    """Writes checkpoints in the background, one at a time; use it in a `with` block, which waits for the last one.

    A checkpoint that cannot be written ends the run at the next one or at the end of the block, unless the block fails itself.

    Args:
        folder: where checkpoints go; with several processes a folder that all of them see. say: takes a remark.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.here: Ranks = ranks()
        self.mark = self.here.decided(lambda: uuid.uuid4().hex[:8])
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._given_up = threading.Event()

    def __enter__(self) -> Saver:
        if self.here.leads:
            for left in self.folder.glob(".parts-*"):
                shutil.rmtree(left, ignore_errors=True)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt):
            self._given_up.set()
        self._wait(raising=error is None or isinstance(error, KeyboardInterrupt))

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Begin to write the state after `step` steps; returns as soon as it is copied.

        Raises:
            LayerwiseError: the one before could not be written (no room); those before that are untouched.
        """
        self._wait(raising=True)
        mine, layout = _copied(tensors, self.here)
        meta = json.loads(json.dumps({"step": step, **meta}))
        self._thread = threading.Thread(target=self._try, args=(step, mine, layout, meta), name=f"checkpoint-{step}")
        self._thread.start()

    def _wait(self, raising: bool) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None and raising:
            raise error

    def _try(self, step: int, *state: Any) -> None:
        try:
            self._write(step, *state)
        except OSError as error:
            whole = [path.name for path in checkpoints(self.folder)]
            kept = f"the checkpoint {whole[-1]} before it is whole" if whole else "there is none before it"
            self._error = LayerwiseError(f"the checkpoint of step {step} could not be written ({error}); {kept}")
        except BaseException as error:
            self._error = error

    def _write(self, step: int, mine: dict[str, Tensor], layout: dict[str, Any], meta: dict[str, Any]) -> None:
        # The other processes' files lie beside the checkpoint until the leader takes them in.
        parts = self.folder / f".parts-{self.mark}-{step}"
        own = _file(self.here.rank, self.here.world)
        if not self.here.leads:
            if mine:
                _write_part(parts / own, mine)
            return
        with whole_folder(self.folder / f"step-{step:09d}") as temporary:
            save_tensors(temporary / own, mine)
            for name in sorted({file for entry in layout.values() for file, _ in entry["parts"]} - {own}):
                self._take_in(parts / name, temporary)
            write_json(temporary / "layout.json", layout)
            write_json(temporary / "meta.json", meta)
        shutil.rmtree(parts, ignore_errors=True)
        for old in checkpoints(self.folder)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def _take_in(self, part: Path, folder: Path) -> None:
        until = time.monotonic() + PARTS_SECONDS
        while not part.is_file():
            if self._given_up.wait(0.01) or time.monotonic() > until:
                raise OSError(f"{part} did not appear: another process ended, or does not see this folder")
        part.replace(folder / part.name)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints below `folder`, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def _file(rank: int, world: int) -> str:
    return "state.safetensors" if world == 1 else f"state-{rank:05d}-of-{world:05d}.safetensors"


def _copied(tensors: dict[str, Tensor], here: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies on the CPU of what this process writes, and where everything will lie: `{name: {shape, parts: [[file, first row]]}}`.

    What is not sharded is the same everywhere and written by the leader.
    """
    mine: dict[str, Tensor] = {}
    layout: dict[str, Any] = {}
    for name, tensor in tensors.items():
        local, _ = rows_here(tensor.detach())
        sharded = isinstance(tensor, DTensor)
        size = -(-tensor.shape[0] // here.world) if sharded else 0
        starts = [r * size for r in range(here.world) if r * size < tensor.shape[0]] if sharded else [0]
        layout[name] = {"shape": list(tensor.shape), "parts": [[_file(r, here.world), start] for r, start in enumerate(starts)]}
        if (sharded and local.shape[0]) or (not sharded and here.leads):
            mine[name] = local.to("cpu", copy=True).contiguous()
    return mine, layout


def _write_part(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name("." + path.name)
    save_tensors(unfinished, tensors)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


@dataclass(frozen=True)
class State:
    """The tensors of a checkpoint, read when they are asked for, whole or some rows of them.

    Attributes:
        folder: of the checkpoint. layout: see `_copied`. prefix: of the names in it.
    """

    folder: Path
    layout: dict[str, Any]
    prefix: str = ""

    @property
    def names(self) -> list[str]:
        return [name.removeprefix(self.prefix) for name in self.layout if name.startswith(self.prefix)]

    def below(self, prefix: str) -> State:
        """The tensors whose names begin so, without it."""
        return State(self.folder, self.layout, f"{self.prefix}{prefix}.")

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self.layout[self.prefix + name]["shape"])

    def read(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        """`rows` rows from `first` on (None: all of them)."""
        full, parts = self.prefix + name, self.layout[self.prefix + name]["parts"]
        shape = self.shape(name)
        if not shape or (len(parts) == 1 and rows is None):
            return _slice(self.folder / parts[0][0], full, None)
        last = first + (shape[0] if rows is None else rows)
        ends = [start for _, start in parts[1:]] + [shape[0]]
        found = [
            _slice(self.folder / file, full, (max(first, start) - start, min(last, end) - start))
            for (file, start), end in zip(parts, ends, strict=True)
            if start < last and end > first
        ]
        return torch.cat(found) if found else _slice(self.folder / parts[0][0], full, (0, 0))

    def read_like(self, name: str, tensor: Tensor) -> Tensor:
        """What this process holds of a tensor laid out like `tensor`."""
        if not isinstance(tensor, DTensor):
            return self.read(name)
        local, first = rows_here(tensor)
        return like_rows(self.read(name, first, local.shape[0]).to(local.device), tensor)


def _slice(path: Path, name: str, rows: tuple[int, int] | None) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name) if rows is None else file.get_slice(name)[rows[0] : rows[1]]
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from error


def load_state(folder: Path, say: Callable[[str], None]) -> tuple[State, dict[str, Any]] | None:
    """The newest checkpoint (by its step) whose checksums hold; damaged ones are named to `say` and passed over. None if there is none.

    The leader chooses, so that all processes go on from the same one.
    """

    def choose() -> str | None:
        found = checkpoints(folder)
        for i, path in reversed(list(enumerate(found))):
            try:
                check_folder(path)
                _read(path)
                return path.name
            except (BadInput, OSError, ValueError) as error:
                say(
                    f"{error}; "
                    + (f"going back to the checkpoint before it, {found[i - 1].name}" if i else "no other is left: starting anew")
                )
        return None

    chosen = ranks().decided(choose)
    return None if chosen is None else _read(folder / chosen)


def _read(path: Path) -> tuple[State, dict[str, Any]]:
    return State(path, json.loads((path / "layout.json").read_text())), json.loads((path / "meta.json").read_text())


@torch.no_grad()
def restore(tensors: dict[str, Tensor], state: State) -> None:
    """Fill tensors, in place, with what stands in `state` under their names."""
    if set(tensors) != set(state.names):
        odd = sorted(set(tensors) ^ set(state.names))
        raise BadInput(f"{state.folder} is the checkpoint of another model: {odd[0]} is only on one side")
    for name, tensor in tensors.items():
        if state.shape(name) != tensor.shape:
            raise BadInput(f"{state.folder}: {name} is {tuple(state.shape(name))} there and {tuple(tensor.shape)} here")
        tensor.copy_(state.read_like(name, tensor))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as tensors by name, `<parameter number>.<key>`; numbers become float64 scalars."""
    state = optimizer.state_dict()["state"]
    return {
        f"{i}.{key}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for i, entry in state.items()
        for key, value in entry.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, kept: State) -> None:
    """Give an optimizer back what `optimizer_tensors` took."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name in kept.names:
        i, key = name.split(".", 1)
        parameter = parameters[int(i)]
        # What has a parameter's shape is laid out as it is; step counts and the like are whole everywhere.
        like = parameter.shape == kept.shape(name) and parameter.dim() > 0
        state.setdefault(int(i), {})[key] = kept.read_like(name, parameter) if like else kept.read(name)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
