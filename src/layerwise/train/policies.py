"""What acts on a training run from outside, at a few named moments.

    start(run)           the model and objective stand; the optimizer is made after it, so what is frozen here is left out
    before_step(run)     before a step's first forward
    after_backward(run)  all gradients of the step are there, not yet clipped
    after_step(run)      the weights have moved; run.step counts this step already
    end(run)             after the last step

A policy may also hand out `around` callables, which wrap every layer's call, keep tensors that belong in a checkpoint
(`state`), and leave `findings` in the stage's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layerwise.analyze.findings import Findings, Table
from layerwise.analyze.gradients import depth_gradient_norms, variation
from layerwise.analyze.rotation import kernels_by_depth, rotation
from layerwise.stack.around import StochasticDepth
from layerwise.stack.context import Around
from layerwise.stack.depth import depth_of, view
from layerwise.stack.spec import indices

if TYPE_CHECKING:
    from layerwise.train.loop import Run

POLICIES = {
    "freeze": "layerwise.train.policies:Freeze",
    "gradient-norms": "layerwise.train.policies:GradientNorms",
    "layer-dropout": "layerwise.train.policies:LayerDropout",
    "rotation": "layerwise.train.policies:Rotation",
}


class Policy:
    """A policy that does nothing; the real ones override what they need."""

    around: tuple[Around, ...] = ()

    def start(self, run: Run) -> None: ...
    def before_step(self, run: Run) -> None: ...
    def after_backward(self, run: Run) -> None: ...
    def after_step(self, run: Run) -> None: ...
    def end(self, run: Run) -> None: ...

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs back."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""

    def findings(self) -> Findings | None:
        """What the policy saw, for the stage's result."""
        return None


class Freeze(Policy):
    """Layers that are not trained in this stage; they are as trainable as before afterwards.

    Args:
        layers: indices or slices; embedding, head: freeze what lies before or after the layers too.
    """

    def __init__(self, *, layers: Sequence[str | int] = (), embedding: bool = False, head: bool = False) -> None:
        self.layers, self.embedding, self.head = layers, embedding, head
        self._frozen: list[torch.nn.Parameter] = []

    def start(self, run: Run) -> None:
        depth = view(run.model).depth
        chosen = {i for key in self.layers for i in indices(key, depth)}
        chosen |= {-1} if self.embedding else set()
        chosen |= {depth} if self.head else set()
        depths = depth_of(run.model)
        self._frozen = [p for n, p in run.model.named_parameters() if depths[n] in chosen and p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def end(self, run: Run) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)


class LayerDropout(Policy):
    """Stochastic depth for this stage only: layer i is skipped by a sample with probability rate * (i / (depth - 1)) ** power.

    Args:
        rate: probability at the top layer. power: 0 gives every layer the same, 1 (linear) is Huang et al. 2016.
    """

    def __init__(self, *, rate: float = 0.1, power: float = 1.0) -> None:
        self.rate, self.power = rate, power

    def start(self, run: Run) -> None:
        last = max(run.model.stack.depth - 1, 1)
        self.around = (StochasticDepth([self.rate * (i / last) ** self.power for i in range(run.model.stack.depth)]),)


class GradientNorms(Policy):
    """Logs the gradient norm of every depth, `grad_norm/<depth>`, and leaves first and last values as a table."""

    def __init__(self, *, every: int = 10) -> None:
        self.every = every
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}

    def after_backward(self, run: Run) -> None:
        if (run.step + 1) % self.every == 0 or run.step in (0, run.total - 1):
            self._last = depth_gradient_norms(run.model)
            self._first = self._first or self._last
            run.log({f"grad_norm/{i}": v for i, v in self._last.items()})

    def state(self) -> dict[str, Tensor]:
        return {f"{i}": torch.tensor([v, self._last.get(i, v)], dtype=torch.float64) for i, v in self._first.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._first = {int(i): v[0].item() for i, v in state.items()}
        self._last = {int(i): v[1].item() for i, v in state.items()}

    def findings(self) -> Findings:
        rows: list[list] = [[i, self._first[i], self._last[i]] for i in sorted(self._first)]
        inner = [v for i, v in self._last.items() if 0 <= i < max(self._last)]
        table = Table("Gradient norm by layer", ["layer", "first step", "last step"], rows)
        return Findings({"grad_norm_variation": variation(inner)}, [table])


class Rotation(Policy):
    """Logs how far every layer's weights have turned since the stage began, `rotation/<depth>`.

    Source: Carbonnelle and De Vleeschouwer 2018 (arXiv 1806.01603), see `layerwise.analyze.rotation`.
    """

    def __init__(self, *, every: int = 10) -> None:
        self.every = every
        self._start: dict[int, Tensor] = {}
        self._now: dict[int, float] = {}

    def start(self, run: Run) -> None:
        self._start = kernels_by_depth(run.model)

    def after_step(self, run: Run) -> None:
        if run.step % self.every == 0 or run.step == run.total:
            self._now = rotation(self._start, kernels_by_depth(run.model))
            run.log({f"rotation/{i}": v for i, v in self._now.items()})

    def state(self) -> dict[str, Tensor]:
        return {str(i): w for i, w in self._start.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._start = {int(i): w for i, w in state.items()}

    def findings(self) -> Findings:
        values = list(self._now.values()) or [0.0]
        table = Table("Rotation since the stage began", ["layer", "cosine distance"], [[i, v] for i, v in sorted(self._now.items())])
        return Findings({"rotation_mean": sum(values) / len(values), "rotation_min": min(values)}, [table])
