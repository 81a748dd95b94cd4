"""One step on many devices: replicas (DDP) or shards (FSDP2), put on from outside; the model's code knows of neither.

Sources: Li et al. 2020, "PyTorch Distributed" (DDP); Zhao et al. 2023, "PyTorch FSDP"; `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from layerwise.models.checkpoint import assemble
from layerwise.models.model import Model, make_model
from layerwise.models.origin import origin_of, with_origin
from layerwise.models.spec import model_spec, spec_data
from layerwise.stack.depth import view
from layerwise.stack.sharding import whole
from layerwise.train.spec import TrainSpec


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shards(spec: TrainSpec) -> bool:
    """Whether a stage cuts its model into shards: it asks for it and there is more than one process."""
    return spec.parallel == "fsdp" and processes() > 1


def shard(module: nn.Module, spec: TrainSpec, device: torch.device, *, root: bool = False) -> None:
    """Cut a layer's parameters by rows over all processes; the whole ones are given up.

    In bfloat16 training, layers are gathered as bfloat16; what stands outside them (embedding, head: `root`) stays float32,
    so that the residual stream is what it is on one device. Gradients are summed in float32.
    """
    if isinstance(module, FSDPModule) or not any(True for _ in module.parameters()):
        return
    low = spec.precision == "bf16" and not root
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if low else MixedPrecisionPolicy()
    fully_shard(module, mesh=init_device_mesh("cuda" if device.type == "cuda" else "cpu", (processes(),)), mp_policy=policy)


def spread(step: nn.Module, model: nn.Module, spec: TrainSpec, device: torch.device) -> nn.Module:
    """`step` (model and objective as one module) ready to run on every process.

    A step may leave parameters out: skipped layers, a mask token, a head. Replicas look for them in every step; shards need not.
    """
    if processes() == 1:
        return step
    if shards(spec):
        for layer in dict.fromkeys(view(model).layers):
            shard(layer, spec, device)
        shard(step, spec, device, root=True)
        return step
    ids = [device.index] if device.type == "cuda" else None
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return DistributedDataParallel(step, device_ids=ids, find_unused_parameters=True)


def waiting(module: nn.Module, wait: bool) -> contextlib.AbstractContextManager[Any]:
    """A micro-batch whose gradients wait for those of the next ones before processes exchange them."""
    if isinstance(module, DistributedDataParallel) and wait:
        return module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not wait)
    return contextlib.nullcontext()


def summed(values: list[float] | Tensor, device: torch.device) -> Tensor:
    """The sum over all processes, float64."""
    total = torch.as_tensor(values, dtype=torch.float64).to(device)
    if processes() > 1:
        dist.all_reduce(total)
    return total


def outline(model: Model) -> dict[str, Any]:
    """All that another process needs to lay the model out without values: plain data."""
    first: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, held in _held(model):
        if id(held) in first:
            shared[name] = first[id(held)]
        first.setdefault(id(held), name)
    dtypes = {name: str(held.dtype).removeprefix("torch.") for name, held in _held(model)}
    return {"spec": spec_data(model.spec), "shared": shared, "dtypes": dtypes}


def outlined(data: dict[str, Any]) -> Model:
    """The model of an `outline` on the meta device: shapes, no values. Sharded training gives each process its share of those."""
    spec = model_spec(data["spec"])
    with torch.device("meta"):
        shapes = make_model(spec).state_dict()
    tensors = {n: t.to(getattr(torch, data["dtypes"][n])) for n, t in shapes.items() if n not in data["shared"]}
    return assemble(spec, tensors, data["shared"], None, Path("the leader's model"))


def dealt(model: nn.Module, values: dict[str, Tensor], device: torch.device) -> None:
    """Give a sharded model rank 0's values: of every tensor each process gets its rows, one tensor after the other.

    Args:
        model: sharded; its tensors may be on the meta device, except on rank 0.
        values: rank 0's whole tensors by name; the others pass nothing.
    """
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        model.to_empty(device=device)
    done: set[int] = set()
    for name, held in _held(model):
        if id(held) in done:
            continue
        done.add(id(held))
        full = values[name].to(device) if dist.get_rank() == 0 else torch.empty(held.shape, dtype=held.dtype, device=device)
        with torch.no_grad():
            if isinstance(held, DTensor):
                held.to_local().copy_(distribute_tensor(full, held.device_mesh, held.placements, src_data_rank=0).to_local())
            else:
                dist.broadcast(full, 0)
                held.copy_(full)


def gathered(model: Model) -> Model:
    """A sharded model as a whole one on the CPU of rank 0; the other processes take part and get it without values.

    The tensors come one after the other, so that a device holds no more than its shards and one whole tensor.
    """
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model
    keeps = dist.get_rank() == 0
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, held in _held(model):
        if id(held) in first:
            shared[name] = first[id(held)]
            continue
        first[id(held)] = name
        full = whole(held.detach())
        tensors[name] = full.cpu() if keeps else torch.empty_like(full, device="meta")
    made = assemble(model.spec, tensors, shared, None, Path("the trained model"))
    return with_origin(made, origin_of(model))


def _held(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and tensors of a state dict, as the module holds them, so that a tensor with two names is known by its identity."""
    inside = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    return [(name, inside[name]) for name in model.state_dict()]
