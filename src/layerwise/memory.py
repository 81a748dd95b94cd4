"""How much memory this machine has, and a refusal of what could never fit it, before any of it is taken."""

from __future__ import annotations

import os

from layerwise.errors import BadInput


def memory() -> int:
    """Bytes of memory of this machine and its GPUs together."""
    import torch

    gpus = (torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + sum(gpus)


def check_room(wanted: int, what: str) -> None:
    """Refuse what could not fit this machine even if it were the only thing there.

    Args:
        wanted: bytes. what: takes them, for the message.

    Raises:
        BadInput: as said, with both numbers.
    """
    if wanted > (most := memory()):
        raise BadInput(f"{what} would take {_shown(wanted)}; this machine has {_shown(most)} of memory, GPUs included")


def _shown(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size < 1e15 else f"{size / 1e9:.3g} GB"
