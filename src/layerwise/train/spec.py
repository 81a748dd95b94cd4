"""What a training stage is: plain data, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from layerwise.complaint import FORBID
from layerwise.errors import BadInput
from layerwise.optim.spec import OptimizerSpec, ScheduleSpec


@dataclass(frozen=True)
class TrainSpec:
    """One stage of training.

    Attributes:
        objective: an entry of `layerwise.objectives.OBJECTIVES`; options are its arguments.
        steps: optimizer steps. epochs: or passes over the training rows (exactly one of the two).
        batch: rows of one step over all processes and micro-batches. accumulate: micro-batches it is cut into.
        optimizer, schedule: see `layerwise.optim.spec`.
        clip: largest gradient norm; None does not clip.
        precision: `bf16` runs matrix products in bfloat16 under autocast, weights stay float32.
        compile: compile every layer with `torch.compile`.
        recompute: layers whose inner activations are not kept but computed again in the backward pass: all (True), none, or
            indices and slices (`["::2"]`). Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
        parallel: with several processes, `ddp` keeps a replica of everything in each, `fsdp` a share of every parameter,
            gradient and optimizer state. One process takes no notice.
        policies: what acts on the run from outside, each `{name: ..., option: ...}`; see `layerwise.train.policies`.
        log_every: steps between logged values. val_every: steps between measurements of the validation loss (0: never),
            over val_batches batches.
        checkpoint_every: steps between checkpoints (None: about one a minute).
        divergence: training stops when the logged loss exceeds this multiple of the first one (None: never).
    """

    objective: str
    options: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    epochs: float | None = None
    batch: int = 16
    accumulate: int = 1
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    clip: float | None = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    recompute: bool | tuple[str | int, ...] = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    policies: tuple[dict[str, Any], ...] = ()
    log_every: int = 10
    val_every: int = 0
    val_batches: int = 8
    checkpoint_every: int | None = None
    divergence: float | None = 3.0

    __pydantic_config__ = FORBID

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise BadInput("a training stage needs either steps or epochs")
        for name in ("steps", "epochs", "batch", "accumulate", "log_every", "checkpoint_every", "clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise BadInput(f"{name} must be positive; it is {value}")
        if self.val_every < 0 or self.val_batches < 1:
            raise BadInput(f"val_every is >= 0 and val_batches >= 1; got {self.val_every} and {self.val_batches}")
        if self.batch % self.accumulate:
            raise BadInput(f"batch ({self.batch}) must be a multiple of accumulate ({self.accumulate})")
        for policy in self.policies:
            if "name" not in policy:
                raise BadInput(f"a policy needs a name: {policy}")

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of this stage on `rows` training rows."""
        return self.steps if self.steps is not None else max(1, round((self.epochs or 0) * rows / self.batch))
