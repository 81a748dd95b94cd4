"""Tensors of which every process holds a part (PyTorch's DTensor): the whole, and this process's rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; of a sharded one all processes must ask together. Other tensors are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_here(tensor: Tensor) -> tuple[Tensor, int]:
    """The part that this process holds and the row of the full tensor it begins at.

    Raises:
        NotImplementedError: the tensor is cut along another axis than the first.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0
    (placement,) = tensor.placements
    if not isinstance(placement, Shard) or placement.dim != 0:
        raise NotImplementedError(f"tensors are sharded by rows; this one is {placement}")
    mesh: Any = tensor.device_mesh
    size = -(-tensor.shape[0] // mesh.size())
    return tensor.to_local(), min(mesh.get_local_rank() * size, tensor.shape[0])


def like_rows(local: Tensor, tensor: Tensor) -> Tensor:
    """`local` as the part of a tensor that is laid out as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return local
    return DTensor.from_local(local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride())
