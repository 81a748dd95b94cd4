"""What a job's training stages will need, worked out from the job alone: memory of each GPU, operations, time.

The model is laid out and a step is taken with tensors that have shapes and no values (PyTorch's fake tensors), so what is
counted is the code that will run, and a model larger than this machine is no trouble.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from layerwise.analyze.cost import Operations
from layerwise.analyze.ledger import SavedTensors
from layerwise.data.load import load_data
from layerwise.data.tokenizer import SPECIALS
from layerwise.edit import PREVIEWS
from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.jobs.cache import cache_folder
from layerwise.jobs.check import rehearsed
from layerwise.jobs.fill import filled
from layerwise.jobs.schema import Job, Plan
from layerwise.models.load import described
from layerwise.models.model import make_model
from layerwise.models.spec import ModelSpec
from layerwise.objectives import OBJECTIVES
from layerwise.objectives.language import MaskedLM
from layerwise.optim.memory import state_formula, trained_sizes
from layerwise.stack.depth import view
from layerwise.table import lookup, unknown
from layerwise.train.recompute import recomputing
from layerwise.train.spec import TrainSpec


@dataclass(frozen=True)
class Gpu:
    """A GPU by its makers' data sheet: dense bfloat16 and plain float32 TFLOPS, memory in GB, bandwidth in GB/s."""

    bf16: float
    fp32: float
    memory: float
    bandwidth: float


GPUS = {
    "h200": Gpu(989, 67, 141, 4800),
    "h100": Gpu(989, 67, 80, 3350),
    "a100": Gpu(312, 19.5, 80, 2039),
    "l40s": Gpu(362, 91.6, 48, 864),
    "rtx4090": Gpu(165, 82.6, 24, 1008),
}
MFU = 0.35
"""Share of the peak rate that a step is assumed to reach; published training runs of plain transformers report 0.3 to 0.5."""


@dataclass(frozen=True)
class Estimate:
    """What one training stage needs. Bytes are those of each GPU; operations count a multiply-add as two.

    Attributes:
        parameters, gradients, optimizer: bytes; optimizer None where no formula is known (it counts as nothing then).
        activations: most bytes saved for the backward pass at once. communication: buckets of DDP, or what FSDP has gathered.
        forward_flops, step_flops: of one token (one row of images), of the forward pass and of a whole training step. Language
            models make the gradients of the vocabulary's matrix in the forward pass, so it has three products there, not one.
        step_seconds, stage_seconds: at the assumed utilization; None where the number of steps is not known.
        fits: whether all of it is less than the GPU has. notes: what was not counted.
    """

    variant: str
    stage: str
    parallel: str
    rows: int
    parameters: int
    gradients: int
    optimizer: int | None
    activations: int
    communication: int
    forward_flops: float
    step_flops: float
    step_seconds: float
    stage_seconds: float | None
    tokens_per_second: float
    fits: bool
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return self.parameters + self.gradients + (self.optimizer or 0) + self.activations + self.communication

    def data(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "bytes": self.bytes}


def estimate_job(job: Job, *, gpus: int = 1, gpu: str = "h200", mfu: float = MFU, data_dir: Path | None = None) -> list[Estimate]:
    """An estimate of every training stage of every variant.

    Raises:
        BadInput: the job cannot work, the GPU is not in the table, or a stage's batch cannot be shared out among so many.
    """
    if gpu not in GPUS:
        raise unknown(gpu, GPUS, "GPU")
    if gpus < 1 or not 0 < mfu <= 1:
        raise BadInput(f"--gpus is at least 1 and --mfu in (0, 1]; got {gpus} and {mfu}")
    return [found for plan in job.plans().values() for found in _stages(plan, gpus, gpu, mfu, data_dir)]


def _stages(plan: Plan, gpus: int, gpu: str, mfu: float, data_dir: Path | None) -> Iterator[Estimate]:
    spec, data = _start(plan, data_dir)
    for stage in rehearsed(plan):
        if stage.kind == "edit":
            spec = lookup(PREVIEWS, stage.what, "preview")(spec, **stage.options)
        elif isinstance(stage.spec, TrainSpec):
            share = stage.spec.accumulate * gpus
            if stage.spec.batch % share:
                raise BadInput(f"stages.{stage.name}: batch ({stage.spec.batch}) must be a multiple of accumulate x GPUs ({share})")
            yield _estimate(plan, stage.name, stage.spec, spec, data, gpus, GPUS[gpu], mfu)


def _start(plan: Plan, data_dir: Path | None) -> tuple[ModelSpec, Any]:
    """The model's description and something that stands for the data: text is not read, images are, for their size."""
    if isinstance(plan.model, Path):
        spec = described(plan.model)
    else:
        chosen = plan.data.tokenizer
        spec = plan.model.with_vocab(len(SPECIALS) + 256 if chosen.kind == "bytes" else chosen.vocab)
    if not isinstance(spec.embedding, TokenSpec):
        data = load_data(plan.data, data_dir, cache_folder())
        return filled(spec, data) if isinstance(plan.model, ModelSpec) else spec, data
    special = dict.fromkeys(("pad_id", "eos_id", "mask_id", "cls_id", "sep_id"), 0)
    return spec, SimpleNamespace(vocab=(spec.target or spec.embedding).vocab, train=None, augment=None, **special)


def _estimate(plan: Plan, name: str, train: TrainSpec, spec: ModelSpec, data: Any, gpus: int, gpu: Gpu, mfu: float) -> Estimate:
    rows = train.batch // train.accumulate // gpus
    tokens = plan.data.length if isinstance(spec.embedding, TokenSpec) else 1
    one, two = (_step(train, spec, data, r, tokens) for r in (1, 2))
    # Everything saved is in proportion to the rows, or (casts of weights, gradients of a large matrix) does not depend on them.
    saved = round(one.saved + (two.saved - one.saved) * (rows - 1))
    forward, whole = (two.forward - one.forward) / tokens, (two.flops - one.flops) / tokens
    parameters, trained = one.parameters, [p for p in one.parameters if p.requires_grad]
    state = state_formula(train.optimizer, one.sizes)
    # Step counters are scalars of four bytes.
    optimizer = None if state is None else _of(trained, state) + (4 * len(trained) if train.optimizer.name != "sgd" else 0)
    held, made = _bytes(parameters), _bytes(trained)
    communication = 0
    if gpus > 1 and train.parallel == "ddp":
        communication = made
    elif gpus > 1:
        # Two layers at a time are gathered (one is fetched ahead), and what stands outside the layers, with its gradient.
        low = 0.5 if train.precision == "bf16" else 1.0
        communication = round(2 * low * one.largest_layer + 2 * one.outside)
        held, made = -(-held // gpus), -(-made // gpus)
        optimizer = None if optimizer is None else -(-optimizer // gpus)
    peak = (gpu.bf16 if train.precision == "bf16" else gpu.fp32) * 1e12
    update = (2 * held + made + 2 * (optimizer or 0)) / (gpu.bandwidth * 1e9)
    seconds = train.batch * tokens * whole / gpus / (peak * mfu) + update
    steps = train.steps if train.steps is not None else (train.total_steps(len(data.train)) if data.train is not None else None)
    notes = [*one.notes]
    if optimizer is None:
        notes.append(f"the state of optimizer {train.optimizer.name} is not counted: there is no formula for it")
    if steps is None:
        notes.append("epochs of data that was not read: the number of steps is not known")
    needed = held + made + (optimizer or 0) + saved + communication
    return Estimate(
        plan.variant, name, train.parallel if gpus > 1 else "one GPU", rows, held, made, optimizer, saved, communication, forward, whole,
        seconds, None if steps is None else seconds * steps, train.batch * tokens / seconds, needed < gpu.memory * 1e9, tuple(notes),
    )  # fmt: skip


@dataclass
class _Step:
    saved: int
    forward: int
    flops: int
    parameters: list[nn.Parameter]
    largest_layer: int
    outside: int
    sizes: Any
    notes: tuple[str, ...] = ()


def _step(train: TrainSpec, spec: ModelSpec, data: Any, rows: int, tokens: int) -> _Step:
    """One forward and backward pass over `rows` rows, without values."""
    shapes = _batch(spec, data, rows, tokens)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]), contextlib.ExitStack() as modes:
        model = make_model(spec).train()
        objective = lookup(OBJECTIVES, train.objective, "objective")(data, **train.options)
        modes.enter_context(_Scored(rows * tokens, objective.rate if isinstance(objective, MaskedLM) else 1.0))
        parameters = [*model.parameters(), *objective.parameters()]
        layers = [_bytes(list(layer.parameters())) for layer in view(model).layers]
        with Operations() as operations, SavedTensors(parameters) as saved:
            with torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bf16"):
                batch = {n: torch.zeros(s, dtype=d) for n, (s, d) in shapes.items()}
                try:
                    loss = objective(model, batch, torch.Generator().manual_seed(0), **recomputing(model, train.recompute))
                except DataDependentOutputException as error:
                    raise BadInput(f"{train.objective} cannot be estimated: what it computes depends on values; run a few steps") from error
            forward = operations.total
            loss.mean.backward()
        whole, sizes = _bytes(parameters), trained_sizes(nn.ModuleList([model, objective]))
        return _Step(saved.peak, forward, operations.total, parameters, max(layers, default=0), whole - sum(layers), sizes)


def _batch(spec: ModelSpec, data: Any, rows: int, tokens: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and types of what the model reads."""
    if data.train is not None:
        return {name: (t.shape, t.dtype) for name, t in data.train.batch(torch.arange(rows)).items()}
    names = ["input_ids"] + (["decoder_input_ids"] if spec.decoder is not None else [])
    batch = dict.fromkeys(names, (torch.Size([rows, tokens]), torch.long))
    if spec.head is not None and spec.head.kind == "classifier":
        batch |= {"attention_mask": batch["input_ids"], "labels": (torch.Size([rows]), torch.long)}
    return batch


class _Scored(TorchFunctionMode):
    """Without values nobody can say where a mask is set: of a mask over all `positions` the `share` that a masked objective scores, else all."""

    def __init__(self, positions: int, share: float) -> None:
        super().__init__()
        self.positions, self.share = positions, share

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.nonzero, torch.nonzero):
            count = args[0].numel()
            found = round(count * self.share) if count == self.positions else count
            return torch.zeros(found, args[0].dim(), dtype=torch.long)
        return func(*args, **(kwargs or {}))


def _bytes(tensors: list[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _of(trained: list[nn.Parameter], numbers: int) -> int:
    return numbers * (trained[0].element_size() if trained else 4)


def estimate_rows(found: list[Estimate]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows that show estimates in a terminal."""
    columns = ["stage", "parallel", "rows", "weights", "grads", "optim", "activ", "comm", "sum", "fits", "GFLOP/token", "s/step", "hours"]
    rows: list[list[Any]] = []
    alike: dict[tuple[Any, ...], Estimate] = {}
    for e in found:  # variants that cost the same share a line
        alike.setdefault(tuple(v for k, v in e.data().items() if k != "variant"), e)
    for e in alike.values():
        sizes = [e.parameters, e.gradients, e.optimizer or 0, e.activations, e.communication, e.bytes]
        hours = None if e.stage_seconds is None else e.stage_seconds / 3600
        rows.append(
            [
                f"{e.variant}.{e.stage}",
                e.parallel,
                e.rows,
                *(s / 1e9 for s in sizes),
                "yes" if e.fits else "NO",
                e.step_flops / 1e9,
                e.step_seconds,
                hours,
            ]
        )
    return columns, rows
