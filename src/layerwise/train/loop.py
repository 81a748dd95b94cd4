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
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from layerwise.analyze.findings import Findings
from layerwise.data.order import Order
from layerwise.errors import Diverged, LayerwiseError
from layerwise.evaluate.batches import batches, inference
from layerwise.objectives import OBJECTIVES
from layerwise.objectives.loss import Loss
from layerwise.optim.groups import make_optimizer, set_lr
from layerwise.optim.schedule import factor
from layerwise.stack.context import Around
from layerwise.table import lookup
from layerwise.train.checkpoint import load_state, optimizer_tensors, restore_optimizer, save_state
from layerwise.train.policies import POLICIES, Policy
from layerwise.train.spec import TrainSpec

CHECKPOINT_SECONDS = 60.0


class TrainStep(nn.Module):
    """Model and objective as one module, so that whatever wraps modules (DDP, FSDP) sees the whole forward."""

    def __init__(self, model: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: dict[str, Tensor], generator: torch.Generator, around: tuple[Around, ...]) -> Loss:
        return self.objective(self.model, batch, generator, **({"around": around} if around else {}))


@dataclass
class Run:
    """A training run as policies see it.

    Attributes:
        model, objective, optimizer, data, spec, seed, device: what runs.
        step: steps done. total: steps of the stage. seconds: time spent, over all resumptions.
        last: the newest logged values.
    """

    model: Any
    objective: nn.Module
    data: Any
    spec: TrainSpec
    seed: int
    device: torch.device
    total: int
    listener: Listener
    optimizer: torch.optim.Optimizer = field(init=False)
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    pending: dict[str, float] = field(default_factory=dict)

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
    """What a training stage leaves: metrics and tables in `findings`, time, tokens seen."""

    findings: Findings
    seconds: float
    steps: int
    tokens: int


def train(
    model: Any,
    data: Any,
    spec: TrainSpec,
    *,
    seed: int = 0,
    device: str = "cpu",
    folder: Path | None = None,
    listener: Listener | None = None,
) -> Trained:
    """Train `model` in place.

    Args:
        data: a `layerwise.data.load.Data`; its `train` split is used.
        seed: decides the order of the data and everything drawn at random.
        device: `cpu`, `cuda`, `cuda:1`, ...
        folder: where checkpoints go; training continues from the newest whole one there. None keeps none.

    Raises:
        Diverged: the loss or the gradient is not finite, or the loss has run away; the last good checkpoint stays.
        LayerwiseError: a checkpoint could not be written, or another process of the run is gone.
        KeyboardInterrupt: Ctrl-C (or a polite kill), after a checkpoint was written.
    """
    listener = listener or Listener()
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=torch.device(device).type == "cpu", mixed_precision="bf16" if spec.precision == "bf16" else "no")
    objective = lookup(OBJECTIVES, spec.objective, "objective")(data, **spec.options).to(accelerator.device)
    model.to(accelerator.device).train()
    run = Run(model, objective, data, spec, seed, accelerator.device, spec.total_steps(len(data.train)), listener)
    policies = [lookup(POLICIES, p["name"], "policy")(**{k: v for k, v in p.items() if k != "name"}) for p in spec.policies]
    for policy in policies:
        policy.start(run)
    if spec.compile:
        for layer in model.stack.layers:
            layer.compile()
    step_module = TrainStep(model, objective)
    run.optimizer = make_optimizer(step_module, spec.optimizer)
    names = list(step_module.state_dict())
    wrapped, run.optimizer = accelerator.prepare(step_module, run.optimizer)
    window = _Window()
    if folder is not None:
        _resume(folder, run, step_module, policies, window)
    loop = _Loop(accelerator, wrapped, run, policies, window, folder, names)
    with _polite_stop() as stop, _told_of_lost_peers(loop.world):
        loop.run(stop)
    for policy in policies:
        policy.end(run)
    model.eval()
    found = Findings({"train_loss": window.last} if window.last is not None else {})
    for policy in policies:
        more = policy.findings()
        if more is not None:
            found.metrics |= more.metrics
            found.tables += more.tables
            found.matrices += more.matrices
    return Trained(found, run.seconds, run.step, run.tokens)


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
        run: Run,
        policies: list[Policy],
        window: _Window,
        folder: Path | None,
        names: list[str],
    ) -> None:
        self.accelerator, self.module, self.run_, self.policies, self.window, self.folder = (
            accelerator,
            module,
            run,
            policies,
            window,
            folder,
        )
        self.names = names
        self.order = Order(len(run.data.train), run.spec.batch, run.seed)
        self.generator = torch.Generator(device=run.device)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.augment = getattr(run.data, "augment", None)
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.saved_at = time.monotonic()

    def run(self, stop: threading.Event) -> None:
        run, spec = self.run_, self.run_.spec
        shown: dict[str, float] = {}
        while run.step < run.total:
            began = time.monotonic()
            norm = self._step()
            run.step += 1
            for policy in self.policies:
                policy.after_step(run)
            run.seconds += time.monotonic() - began
            if run.step % spec.log_every == 0 or run.step == run.total or run.step == 1:
                shown = self._log(norm)
            if spec.val_every and (run.step % spec.val_every == 0 or run.step == run.total):
                run.log({"val_loss": self._validate()})
            if run.pending:
                run.listener.metrics({"step": run.step, **run.pending})
                run.pending = {}
            run.listener.progress(run.step, run.total, shown)
            if self._due(stop.is_set()):
                self._save()
            if stop.is_set() and run.step < run.total:
                raise KeyboardInterrupt

    def _step(self) -> Tensor:
        """One optimizer step; returns the gradient norm before clipping."""
        run, spec = self.run_, self.run_.spec
        set_lr(run.optimizer, factor(spec.schedule, run.step, run.total))
        seed = (run.seed * 1_000_003 + run.step) & 0x7FFF_FFFF
        torch.manual_seed(seed)
        self.generator.manual_seed(seed + self.rank)
        for policy in self.policies:
            policy.before_step(run)
        around = tuple(a for policy in self.policies for a in policy.around)
        rows = self.order.indices(run.step)
        # Alone, one micro-batch is divided by its own count. Several micro-batches or processes are divided by one number
        # they all know beforehand, and the exact count puts it right once the gradients are together.
        alone = spec.accumulate == 1 and self.world == 1
        usual = spec.batch / self.world * max(getattr(run.data.train, "tokens_per_row", 0), 1)
        counted: Tensor | None = None
        for i, micro in enumerate(rows.chunk(spec.accumulate)):
            batch = self._batch(micro[self.rank :: self.world])
            waiting = i < spec.accumulate - 1
            with self.accelerator.no_sync(self.module) if waiting else contextlib.nullcontext(), self.accelerator.autocast():
                loss = self.module(batch, self.generator, around)
                self.accelerator.backward(loss.total / (loss.count.clamp(min=1) if alone else usual))
            counted = loss.count if counted is None else counted + loss.count
            self.window.add(loss)
            run.tokens += micro.numel() * (getattr(run.data.train, "tokens_per_row", 0) or 1)
        if not alone and counted is not None:
            self._rescale(usual, counted)
        for policy in self.policies:
            policy.after_backward(run)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if run.device.type == "cpu" and not torch.isfinite(norm):
            self._diverged("the gradient is not finite")
        if spec.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, spec.clip, norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        return norm

    def _rescale(self, usual: float, counted: Tensor) -> None:
        """Gradients were divided by `usual`, and averaged over processes by DDP: make them the exact mean over all items."""
        everyone = self.accelerator.reduce(counted.clone(), "sum")
        scale = usual * self.world / max(float(everyone), 1.0)
        torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], scale)

    def _batch(self, rows: Tensor) -> dict[str, Tensor]:
        batch = {name: value.to(self.run_.device, non_blocking=True) for name, value in self.run_.data.train.batch(rows).items()}
        return batch if self.augment is None else self.augment(batch)

    def _log(self, norm: Tensor) -> dict[str, float]:
        run, spec = self.run_, self.run_.spec
        values = self.window.close()
        if not torch.isfinite(norm) or values["loss"] != values["loss"]:
            self._diverged("the loss or the gradient is not finite")
        if spec.divergence is not None and self.window.first is not None and values["loss"] > spec.divergence * abs(self.window.first) + 1:
            self._diverged(f"the loss has grown from {self.window.first:.4g} to {values['loss']:.4g}")
        values |= {"lr": spec.optimizer.lr * factor(spec.schedule, run.step - 1, run.total), "grad_norm": norm.item()}
        values |= {"tokens": run.tokens, "seconds": round(run.seconds, 3)}
        run.log(values)
        return values

    def _validate(self) -> float:
        run = self.run_
        generator = torch.Generator(device=run.device).manual_seed(0)
        total = count = 0.0
        with inference(run.model):
            for batch in batches(run.data.validation, run.spec.batch, run.spec.val_batches, run.device):
                loss = run.objective(run.model, batch, generator)
                total, count = total + loss.total.item(), count + float(loss.count)
        return total / max(count, 1)

    def _due(self, stopping: bool) -> bool:
        run = self.run_
        if self.folder is None or run.step == run.total:
            return False
        every = run.spec.checkpoint_every
        return stopping or (run.step % every == 0 if every else time.monotonic() - self.saved_at > CHECKPOINT_SECONDS)

    def _save(self) -> None:
        assert self.folder is not None
        run = self.run_
        inner = self.accelerator.unwrap_model(self.module)
        tensors = {f"model.{n}": t for n, t in inner.state_dict().items()}
        tensors |= {f"optimizer.{n}": t for n, t in optimizer_tensors(run.optimizer).items()}
        for i, policy in enumerate(self.policies):
            tensors |= {f"policy.{i}.{n}": t for n, t in policy.state().items()}
        meta = {"seconds": run.seconds, "tokens": run.tokens, "window": vars(self.window), "pending": run.pending}
        if self.accelerator.is_main_process:
            save_state(self.folder, run.step, tensors, meta)
        self.saved_at = time.monotonic()

    def _diverged(self, what: str) -> None:
        kept = "the last good checkpoint is kept" if self.folder is not None else "no checkpoint was asked for"
        raise Diverged(
            f"training diverged at step {self.run_.step}: {what}; {kept}. Lower the learning rate, lengthen the warm-up or clip gradients."
        )


def _resume(folder: Path, run: Run, module: nn.Module, policies: list[Policy], window: _Window) -> None:
    found = load_state(folder, run.listener.say)
    if found is None:
        return
    tensors, meta = found
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, rest = name.split(".", 1)
        parts.setdefault(kind, {})[rest] = tensor
    module.load_state_dict(parts["model"])
    restore_optimizer(run.optimizer, parts.get("optimizer", {}))
    for i, policy in enumerate(policies):
        prefix = f"{i}."
        policy.load_state({n.removeprefix(prefix): t for n, t in parts.get("policy", {}).items() if n.startswith(prefix)})
    run.step, run.seconds, run.tokens, run.pending = meta["step"], meta["seconds"], meta["tokens"], meta["pending"]
    vars(window).update(meta["window"])
    run.listener.say(f"continuing from step {run.step} of {run.total}")


@contextlib.contextmanager
def _told_of_lost_peers(world: int) -> Iterator[None]:
    """What the communication library says when another process is gone, in words."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no class of their own.
        if world == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise LayerwiseError(
            "another process of this run ended or cannot be reached; the run stops, its last checkpoint is kept: "
            f"start all its processes again to go on ({str(error).splitlines()[0][:200]})"
        ) from error


@contextlib.contextmanager
def _polite_stop() -> Iterator[threading.Event]:
    """Ctrl-C and a polite kill end training after the current step; a second one ends it at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    old: dict[int, Callable | int | None] = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
