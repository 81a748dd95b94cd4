"""What acts on a training run from outside, at a few named moments.

    start(run)           the model and objective stand; the optimizer is made after it, so what is frozen here is left out
    before_step(run)     before a step's first forward; `run.clock`, where the learning rate stands, and its `run.ramp` may be set
    after_backward(run)  all gradients of the step are there, not yet clipped
    after_step(run)      the weights have moved; run.step counts this step already
    end(run)             after the last step

A policy that cannot work with every training stage says so in a static `check(spec)`, before anything runs; one that cannot work on every
model in `meets(spec)`, shown the model's description; one that reads a second data set (`Run.probe`) sets `probes`. It may also
hand out `around` callables, which wrap every layer's call, keep tensors that belong in a checkpoint (`state`), and leave
`findings` in the stage's result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from layerwise.analyze.findings import Findings
from layerwise.stack.context import Around

if TYPE_CHECKING:
    from layerwise.train.loop import Run


class Policy:
    """A policy that does nothing; the real ones override what they need."""

    around: tuple[Around, ...] = ()
    probes = False

    def meets(self, spec: Any) -> None:
        """Raises BadInput if the policy cannot work on a model of this description."""

    def start(self, run: Run) -> None: ...
    def before_step(self, run: Run) -> None: ...
    def after_backward(self, run: Run) -> None: ...
    def after_step(self, run: Run) -> None: ...
    def end(self, run: Run) -> None: ...

    def validations(self) -> dict[str, tuple[Around, ...]]:
        """What the validation split is measured with, by name, where it is not the whole model; `val_loss` is the usual name."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs back."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""

    def findings(self) -> Findings | None:
        """What the policy saw, for the stage's result."""
        return None
