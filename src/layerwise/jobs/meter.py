"""How long a stage took and how much memory it needed at most."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Meter:
    """Seconds passed and bytes at the peak (of the device on a GPU, of the whole process on a CPU; 0 where unknown)."""

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def metered(device: torch.device) -> Iterator[Meter]:
    """Measure a block."""
    meter = Meter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_peak()
    began = time.monotonic()
    try:
        yield meter
    finally:
        meter.seconds = time.monotonic() - began
        meter.peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak()


def _reset_peak() -> None:
    """Linux forgets a process's memory peak when 5 is written here; elsewhere the peak since its start is reported."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def _peak() -> int:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
