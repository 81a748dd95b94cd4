"""Progress for a person: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5.0


class Progression:
    """Shows what runs: stage, step, loss, speed, time left.

    Args:
        console: where to; None makes one on standard error.
        quiet: show nothing.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._title = ""
        self._shown = self._began = 0.0
        self._first = 0

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def start(self, title: str) -> None:
        """A stage begins."""
        self._title, self._began, self._shown, self._first = title, time.monotonic(), time.monotonic(), -1
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[values]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(title, total=None, values="")
            self._bar.start()

    def step(self, step: int, total: int, values: dict[str, float]) -> None:
        """A training step ended."""
        now = time.monotonic()
        if self._first < 0:
            self._first = step - 1
        if now - self._shown < (0.1 if self._bar else LINE_SECONDS) and step < total:
            return
        self._shown = now
        rate = (step - self._first) / max(now - self._began, 1e-9)
        tokens = values.get("tokens", 0) / max(values.get("seconds", 0), 1e-9)
        words = [f"loss {values['loss']:.4f}"] if "loss" in values else []
        words += [f"{tokens:,.0f} tokens/s"] if tokens else [f"{rate:.1f} steps/s"]
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total, completed=step, values="  ".join(words))
        else:
            left = (total - step) / max(rate, 1e-9)
            self.say(f"  {self._title}  step {step}/{total}  {'  '.join(words)}  {left:.0f} s left")

    def end(self, message: str) -> None:
        """The stage is over."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if message:
            self.say(message)
