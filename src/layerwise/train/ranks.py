"""Several processes on one job, started by `torchrun` or `accelerate launch`: who leads, and what the leader tells the others.

Rank 0 leads: it decides, writes and speaks. What it decides reaches the others through the store that the launcher keeps, as
JSON, so nothing that arrives can run code.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from layerwise.errors import LayerwiseError

LEAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job.

    Attributes:
        rank, world: its number and how many there are. store: what they talk through; None when alone.
    """

    rank: int = 0
    world: int = 1
    store: Any = None
    _numbers: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, value: Any = None) -> Any:
        """What the leader passes, in every process: plain data. All processes call this, in the same order; it may wait long."""
        if self.world == 1:
            return value
        key = f"layerwise/shared/{next(self._numbers)}"
        if self.leads:
            self.store.set(key, json.dumps(value, default=str))
            return value
        # Asking again and again, and not one long wait in C++, lets Ctrl-C through.
        pause = 0.002
        try:
            while not self.store.check([key]):
                time.sleep(pause)
                pause = min(pause * 1.5, 0.25)
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise LayerwiseError("the leading process of this run ended") from error

    def decided(self, decide: Callable[[], Any]) -> Any:
        """`share` of what only the leader works out."""
        return self.share(decide() if self.leads else None)

    def first_to_tell(self) -> bool:
        """Whether nobody has spoken of the failure yet: of many processes that fail together one tells why."""
        try:
            return self.world == 1 or self.store.add("layerwise/told", 1) == 1
        except RuntimeError:  # the store went down with the process that kept it
            return False

    def leave(self) -> None:
        """The end of the job: the leader waits a little for the others, as it may keep the store they read from."""
        if self.world == 1:
            return
        self.store.add("layerwise/left", 1)
        until = time.monotonic() + LEAVE_SECONDS
        while self.leads and self.store.add("layerwise/left", 0) < self.world and time.monotonic() < until:
            time.sleep(0.01)
        if dist.is_initialized():
            dist.destroy_process_group()


@functools.cache
def ranks() -> Ranks:
    """This process among those that a launcher started; alone when none did."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Ranks()
    store, rank, world = next(iter(dist.rendezvous("env://")))
    return Ranks(rank, world, store)


def join(device: str) -> tuple[Ranks, str]:
    """Meet the other processes, and take the device that is this one's: `cuda` becomes the GPU of the local rank."""
    here = ranks()
    if here.world == 1:
        return here, device
    kind = torch.device(device).type
    if kind == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("layerwise/group", here.store), rank=here.rank, world_size=here.world)
    return here, device


@contextmanager
def in_touch(here: Ranks) -> Iterator[None]:
    """What the communication library says when another process is gone, in words."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no class of their own.
        if here.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise LayerwiseError(
            "another process of this run ended or cannot be reached; the run stops, its last checkpoint is kept: "
            f"start all its processes again to go on ({str(error).splitlines()[0][:200]})"
        ) from error


def end(code: int) -> NoReturn:
    """End this process of several after a failure: what it printed is written, and nothing else is done.

    Gloo's threads still fail what was to be sent, and let go of tensors, which are Python's; threads that do so while the interpreter
    shuts down abort the process, and its exit code is lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
