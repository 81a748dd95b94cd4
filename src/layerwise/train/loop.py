"""The training loop: one step after another, the same on one device or many, exact when resumed.

Everything a step draws at random comes from (seed, step), and the order of the data and the learning rate are functions of
the step, so a checkpoint holds weights, optimizer state and the step, and nothing else.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from layerwise.analyze.findings import Findings
from layerwise.data.order import Order
from layerwise.errors import BadInput, Diverged
from layerwise.evaluate.batches import batches, inference
from layerwise.objectives import OBJECTIVES
from layerwise.objectives.loss import Loss
from layerwise.optim.groups import make_optimizer, set_lr
from layerwise.optim.schedule import factor
from layerwise.stack.context import Around
from layerwise.stack.sharding import whole
from layerwise.table import lookup
from layerwise.train.alone import alone
from layerwise.train.checkpoint import Saver, load_state, optimizer_tensors, restore, restore_optimizer
from layerwise.train.parallel import dealt, gathered, processes, shards, spread, summed, waiting
from layerwise.train.policies import POLICIES, Policy
from layerwise.train.ranks import in_touch, join
from layerwise.train.recompute import recomputing
from layerwise.train.spec import TrainSpec

CHECKPOINT_SECONDS = 60.0


class TrainStep(nn.Module):
    """Model and objective as one module, so that whatever wraps modules (DDP, FSDP) sees the whole forward."""

    def __init__(self, model: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator, context: dict[str, tuple[Around, ...]]) -> Loss:
        return self.objective(self.model, batch, generator, **{name: wrappers for name, wrappers in context.items() if wrappers})


@dataclass
class Run:
    """A training run as policies see it.

    Attributes:
        model, objective, optimizer, data, spec, seed, device: what runs.
        probe: a second data set that is looked at and not trained on, if the stage has one.
        step: steps done. total: steps of the stage. seconds: time spent, over all resumptions.
        clock: where the learning rate's schedule stands, in steps; it is `step` unless a policy sets it before a step.
        ramp: what the scheduled learning rate is multiplied by in this step; 1 unless a policy sets it before the step.
        last: the newest logged values.
        norm: of the step's gradients, where a policy has used them up before the loop could see them.
    """

    model: Any
    objective: Any
    data: Any
    spec: TrainSpec
    seed: int
    device: torch.device
    total: int
    listener: Listener
    probe: Any = None
    optimizer: torch.optim.Optimizer = field(init=False)
    step: int = 0
    clock: float = 0.0
    ramp: float = 1.0
    seconds: float = 0.0
    tokens: int = 0
    pending: dict[str, float] = field(default_factory=dict)
    norm: Tensor | None = None

    @property
    def logs(self) -> bool:
        """Whether values of this step are kept, the loop's own or the validation loss."""
        spec = self.spec
        return self.step in (1, self.total) or self.step % spec.log_every == 0 or bool(spec.val_every and self.step % spec.val_every == 0)

    def log(self, values: dict[str, float]) -> None:
        """Add values to the metrics line of this step."""
        self.pending |= values


class Listener:
    """Who is told how training goes. This one is told and says nothing."""

    def progress(self, step: int, total: int, values: dict[str, float]) -> None:
        """A step ended; `values` are the newest logged ones."""

    def metrics(self, values: dict[str, float]) -> None:
        """Values to keep: `step`, `loss`, `lr`, `tokens`, `seconds`, and what policies logged."""

    def say(self, message: str) -> None:
        """A remark in words."""


@dataclass
class Trained:
    """What a training stage leaves: metrics and tables in `findings`, time, tokens seen, the model.

    The model is the one that was given, but after sharded training a whole one again, on rank 0's CPU (elsewhere without values).
    """

    findings: Findings
    seconds: float
    steps: int
    tokens: int
    model: Any


def train(
    model: Any,
    data: Any,
    spec: TrainSpec,
    *,
    seed: int = 0,
    device: str = "cpu",
    folder: Path | None = None,
    listener: Listener | None = None,
    probe: Any = None,
) -> Trained:
    """Train `model` in place, with as many processes as the launcher started; all of them call this.

    Args:
        data: a `layerwise.data.load.Data`; its `train` split is used.
        seed: decides the order of the data and everything drawn at random.
        device: `cpu`, `cuda`, `cuda:1`, ...
        folder: where checkpoints go; training continues from the newest whole one there. None keeps none.
        probe: another data set, for policies that look at one.

    Raises:
        BadInput: the batch cannot be shared out among the processes.
        Diverged: the loss or the gradient is not finite, or the loss has run away; the last good checkpoint stays.
        LayerwiseError: a checkpoint could not be written, or another process of the run is gone.
        KeyboardInterrupt: Ctrl-C (or a polite kill), after a checkpoint was written.
    """
    listener = listener or Listener()
    here, device = join(device)
    if spec.batch % (spec.accumulate * here.world):
        raise BadInput(f"batch ({spec.batch}) must be a multiple of accumulate x processes ({spec.accumulate} x {here.world})")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=torch.device(device).type == "cpu", mixed_precision="bf16" if spec.precision == "bf16" else "no")
    objective = lookup(OBJECTIVES, spec.objective, "objective")(data, **spec.options).to(accelerator.device)
    if objective.one_process:
        alone(f"the objective {spec.objective}")
    if not shards(spec):
        model.to(accelerator.device)  # a shard goes there by itself, layer by layer
    model.train()
    step_module: nn.Module = TrainStep(model, objective)
    policies = [lookup(POLICIES, p["name"], "policy")(**{k: v for k, v in p.items() if k != "name"}) for p in spec.policies]
    if shards(spec):
        values = {n: t.detach() for n, t in model.state_dict().items()} if here.rank == 0 else {}
        step_module = spread(step_module, model, spec, accelerator.device)
        dealt(model, values, accelerator.device)
        del values
    run = Run(model, objective, data, spec, seed, accelerator.device, spec.total_steps(len(data.train)), listener, probe)
    row = data.train.batch(torch.zeros(1, dtype=torch.long))
    objective.attach(model, {name: value.to(accelerator.device) for name, value in row.items()})
    if shards(spec) and any(True for _ in objective.parameters()):
        raise BadInput(f"{spec.objective} has heads of its own, which are not sharded: use parallel: ddp")
    for policy in policies:
        policy.start(run)
    run.optimizer = make_optimizer(step_module, spec.optimizer)
    wrapped = step_module if shards(spec) else spread(step_module, model, spec, accelerator.device)
    window = _Window()
    if folder is not None:
        _resume(folder, run, step_module, policies, window)
    saver = Saver(folder, listener.say) if folder is not None else None
    loop = _Loop(accelerator, wrapped, step_module, run, policies, window, saver)
    with in_touch(here), saver or contextlib.nullcontext(), compiled(model, spec.compile), _polite_stop(here.world == 1) as stop:
        loop.run(stop)
    for policy in policies:
        policy.end(run)
    model.eval()
    found = Findings({"train_loss": window.last} if window.last is not None else {})
    for more in (objective.finish(model, data), *(policy.findings() for policy in policies)):
        if more is not None:
            found.metrics |= more.metrics
            found.tables += more.tables
            found.matrices += more.matrices
    return Trained(found, run.seconds, run.step, run.tokens, gathered(model))


@dataclass
class _Window:
    """Sums since values were last logged, and the first logged loss."""

    sums: dict[str, float] = field(default_factory=dict)
    count: float = 0.0
    first: float | None = None
    last: float | None = None

    def add(self, loss: Loss) -> None:
        for name, value in {"loss": loss.total, **loss.metrics}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().float().item()
        self.count += float(loss.count)

    def meet(self, device: torch.device) -> None:
        """Put the sums of all processes together, in all of them."""
        if processes() == 1:
            return
        names = sorted(self.sums)
        *sums, self.count = summed([*(self.sums[name] for name in names), self.count], device).tolist()
        self.sums = dict(zip(names, sums, strict=True))

    def leave_to_leader(self) -> None:
        """After `meet`, where the window stays open: the leader keeps the sums, so that they count once."""
        if processes() > 1 and dist.get_rank() > 0:
            self.sums, self.count = dict.fromkeys(self.sums, 0.0), 0.0

    def close(self) -> dict[str, float]:
        means = {name: value / max(self.count, 1) for name, value in self.sums.items()}
        self.sums, self.count = {}, 0.0
        self.last = means["loss"]
        self.first = self.last if self.first is None else self.first
        return means


class _Loop:
    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        inner: nn.Module,
        run: Run,
        policies: list[Policy],
        window: _Window,
        saver: Saver | None,
    ) -> None:
        self.accelerator, self.module, self.inner, self.run_ = accelerator, module, inner, run
        self.policies, self.window, self.saver = policies, window, saver
        self.order = Order(len(run.data.train), run.spec.batch, run.seed)
        self.generator = torch.Generator(device=run.device)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.augment = getattr(run.data, "augment", None)
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.recompute = recomputing(run.model, run.spec.recompute)
        self.saved_at = time.monotonic()
        # What all processes agree on in a step, see `_agree`.
        self.stopping = self.due = False

    def run(self, stop: threading.Event) -> None:
        run, spec = self.run_, self.run_.spec
        shown: dict[str, float] = {}
        while run.step < run.total:
            began = time.monotonic()
            norm = self._step(stop)
            run.step += 1
            for policy in self.policies:
                policy.after_step(run)
            run.seconds += time.monotonic() - began
            if run.step % spec.log_every == 0 or run.step == run.total or run.step == 1:
                shown = self._log(norm)
            if spec.val_every and (run.step % spec.val_every == 0 or run.step == run.total):
                for name, around in self._validations().items():
                    run.log({name: self._validate(around)})
            if run.pending:
                run.listener.metrics({"step": run.step, **run.pending})
                run.pending = {}
            run.listener.progress(run.step, run.total, shown)
            if self.world == 1:
                self.stopping, self.due = stop.is_set(), self._time_is_up()
            if self._wanted():
                self._save()
            if self.stopping and run.step < run.total:
                raise KeyboardInterrupt

    def _step(self, stop: threading.Event) -> Tensor:
        """One optimizer step; returns the gradient norm before clipping."""
        run, spec = self.run_, self.run_.spec
        run.clock, run.ramp = run.step, 1.0
        seed = (run.seed * 1_000_003 + run.step) & 0x7FFF_FFFF
        torch.manual_seed(seed)
        self.generator.manual_seed(seed + self.rank)
        for policy in self.policies:
            policy.before_step(run)
        set_lr(run.optimizer, run.ramp * factor(spec.schedule, run.clock, run.total))
        acting = tuple(a for policy in self.policies for a in policy.around)
        context = {**self.recompute, "around": (*acting, *self.recompute.get("around", ()))}
        rows = self.order.indices(run.step)
        # Alone, one micro-batch is divided by its own count. Several micro-batches or processes are divided by one number
        # they all know beforehand, and the exact count puts it right once the gradients are together.
        alone = spec.accumulate == 1 and self.world == 1
        usual = spec.batch / self.world * max(getattr(run.data.train, "tokens_per_row", 0), 1)
        counted: Tensor | None = None
        run.objective.before_step(run.step, run.total, None if alone else usual)
        for i, micro in enumerate(rows.chunk(spec.accumulate)):
            batch = self._batch(micro[self.rank :: self.world])
            with waiting(self.module, i < spec.accumulate - 1):
                with self.accelerator.autocast():
                    loss = self.module(batch, self.generator, context)
                if not loss.applied:
                    (loss.total / (loss.count.clamp(min=1) if alone else usual)).backward()
            counted = loss.count if counted is None else counted + loss.count
            self.window.add(loss)
            run.tokens += micro.numel() * (getattr(run.data.train, "tokens_per_row", 0) or 1)
        if not alone and counted is not None:
            self._rescale(usual, self._agree(counted, stop))
        for policy in self.policies:
            policy.after_backward(run)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients)) if run.norm is None else run.norm
        if run.device.type == "cpu" and not torch.isfinite(norm):
            self._diverged("the gradient is not finite")
        if spec.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, spec.clip, norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        return norm

    def _agree(self, counted: Tensor, stop: threading.Event) -> float:
        """The items of all processes, and with them whether one of them was told to stop or finds a checkpoint due."""
        if self.world == 1:
            return float(counted)
        everyone, stopping, due = summed([float(counted), float(stop.is_set()), float(self._time_is_up())], self.run_.device).tolist()
        self.stopping, self.due = stopping > 0, due > 0
        return everyone

    def _rescale(self, usual: float, everyone: float) -> None:
        """Gradients were divided by `usual`, and averaged over processes by DDP or FSDP: make them the exact mean over all items."""
        scale = usual * self.world / max(everyone, 1.0)
        torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], scale)

    def _batch(self, rows: Tensor) -> dict[str, Tensor]:
        batch = {name: value.to(self.run_.device, non_blocking=True) for name, value in self.run_.data.train.batch(rows).items()}
        return batch if self.augment is None else self.augment(batch)

    def _log(self, norm: Tensor) -> dict[str, float]:
        run, spec = self.run_, self.run_.spec
        self.window.meet(run.device)
        values = self.window.close()
        if not torch.isfinite(norm) or values["loss"] != values["loss"]:
            self._diverged("the loss or the gradient is not finite")
        if spec.divergence is not None and self.window.first is not None and values["loss"] > spec.divergence * abs(self.window.first) + 1:
            self._diverged(f"the loss has grown from {self.window.first:.4g} to {values['loss']:.4g}")
        values |= {"lr": spec.optimizer.lr * run.ramp * factor(spec.schedule, run.clock, run.total), "grad_norm": norm.item()}
        values |= {"tokens": run.tokens, "seconds": round(run.seconds, 3)}
        run.log(values)
        return values

    def _validations(self) -> dict[str, tuple[Around, ...]]:
        """What to measure on the validation split, by name: the model as it is, unless a policy wants its layers run otherwise."""
        named: dict[str, tuple[Around, ...]] = {"val_loss": ()}
        for policy in self.policies:
            named |= policy.validations()
        return named

    def _validate(self, around: tuple[Around, ...]) -> float:
        run = self.run_
        generator = torch.Generator(device=run.device).manual_seed(0)
        total = count = 0.0
        with inference(run.model):
            for batch in batches(run.data.validation, run.spec.batch, run.spec.val_batches, run.device):
                loss = self.module(batch, generator, {"around": around})  # as a whole: shards are gathered from there
                total, count = total + loss.total.item(), count + float(loss.count)
        if isinstance(self.module, FSDPModule):
            self.module.reshard()  # what stands outside the layers is otherwise kept for a backward pass
        return total / max(count, 1)

    def _time_is_up(self) -> bool:
        return self.run_.spec.checkpoint_every is None and time.monotonic() - self.saved_at > CHECKPOINT_SECONDS

    def _wanted(self) -> bool:
        run = self.run_
        if self.saver is None or run.step == run.total:
            return False
        every = run.spec.checkpoint_every
        return self.stopping or (run.step % every == 0 if every else self.due)

    def _save(self) -> None:
        assert self.saver is not None
        run = self.run_
        self.window.meet(run.device)
        self.window.leave_to_leader()
        tensors = {f"model.{n}": t for n, t in self.inner.state_dict().items()}
        tensors |= {f"optimizer.{n}": t for n, t in optimizer_tensors(run.optimizer).items()}
        for i, policy in enumerate(self.policies):
            tensors |= {f"policy.{i}.{n}": t for n, t in policy.state().items()}
        self.saver.save(
            run.step, tensors, {"seconds": run.seconds, "tokens": run.tokens, "window": vars(self.window), "pending": run.pending}
        )
        self.saved_at = time.monotonic()

    def _diverged(self, what: str) -> None:
        kept = "the last good checkpoint is kept" if self.saver is not None else "no checkpoint was asked for"
        raise Diverged(
            f"training diverged at step {self.run_.step}: {what}; {kept}. Lower the learning rate, lengthen the warm-up or clip gradients."
        )


def _resume(folder: Path, run: Run, module: nn.Module, policies: list[Policy], window: _Window) -> None:
    found = load_state(folder, run.listener.say)
    if found is None:
        return
    tensors, meta = found
    restore(module.state_dict(), tensors.below("model"))
    restore_optimizer(run.optimizer, tensors.below("optimizer"))
    for i, policy in enumerate(policies):
        kept = tensors.below(f"policy.{i}")
        policy.load_state({name: kept.read(name) for name in kept.names})
    run.step, run.seconds, run.tokens, run.pending = meta["step"], meta["seconds"], meta["tokens"], meta["pending"]
    vars(window).update(meta["window"])
    window.leave_to_leader()
    run.listener.say(f"continuing from step {run.step} of {run.total}")


@contextlib.contextmanager
def compiled(model: Any, wanted: bool) -> Iterator[None]:
    """Every layer compiled inside the block. What wraps a layer (recomputation, gathering of shards) stays outside of it."""
    stacks = [stack for stack in (model.stack, getattr(model, "decoder", None)) if stack is not None]
    layers = list(dict.fromkeys(layer for stack in stacks for layer in stack.layers)) if wanted else []
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextlib.contextmanager
def _polite_stop(alone: bool = True) -> Iterator[threading.Event]:
    """Ctrl-C and a polite kill end training after the current step; a second one ends it at once.

    Of several processes the launcher passes the signal on, so a second one means nothing; it also kills those that do not end.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set() and alone:
            raise KeyboardInterrupt
        stop.set()

    old: dict[int, Callable | int | None] = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
