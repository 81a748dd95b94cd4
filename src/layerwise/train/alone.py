"""What some policies and objectives cannot do yet: run beside other processes."""

from __future__ import annotations

import torch

from layerwise.errors import BadInput


def alone(what: str) -> None:
    """Refuse something on several processes.

    Raises:
        BadInput: there are several.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise BadInput(f"{what} uses gradients before processes have averaged them: run it on one process")
