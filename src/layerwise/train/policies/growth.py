"""A stack that grows inside one stage of training: depth by depth, perhaps unrolled deeper than it is, older layers perhaps at rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from layerwise.edit.growth import Where, sources, spread
from layerwise.errors import BadInput
from layerwise.stack.context import Around, Call, Context
from layerwise.train.policies.policy import Policy

if TYPE_CHECKING:
    from layerwise.train.loop import Run

Unroll = Literal["none", "lvps", "uniform", "sigmoid", "full"]


def unrolled_depth(u: float, layers: int, depth: int, how: Unroll) -> int:
    """The depth that `layers` layers are unrolled to in one forward, between `layers` and `depth`.

    `lvps` (low-value-prioritized sampling: low depths come most often) follows a hyperbola through (1e-6, R + 0.4) and (1, 0.6)
    with R = depth / layers, in units of `layers`, rounded down; `sigmoid` falls from R + 0.4 to 0.6 around u = 1/2.

    Args:
        u: uniform in [1e-6, 1].

    Source: Pan et al. 2024, "Preparing Lessons for Progressive Training on Language Models" (arXiv 2401.09192), section 3, with the
    constants of its published code.
    """
    if how in ("none", "full"):
        return depth if how == "full" else layers
    if how == "uniform":
        return min(layers + int(u * (depth - layers + 1)), depth)
    ratio, least = depth / layers, 1e-6
    begin, end = ratio + 0.4, 0.6
    if how == "lvps":
        n = (begin * least - end) / (end - begin)
        y = end * (n + 1) / (u + n)
    else:
        y = (begin - end) / (1 + math.exp(20 * (u - 0.5))) + end
    return int(min(max(y, 1.0), ratio) * layers)


class Growth(Policy):
    """The stage begins with the lowest layers only and takes in more at given steps; the others neither run nor change until then.

    Two papers are settings of this. Incremental training: fresh layers, `settle: 0.5`. Apollo: `new: interpolate, unroll: lvps`.
    Validation runs the layers in use; where they are unrolled, also unrolled to the full depth (`val_loss_unrolled`).

    Args:
        depths: layers in use, stage by stage; the last number is the stack's depth.
        starts: share of the steps after which each stage begins, the first 0 (None: stages of equal length).
        new: what newly used layers begin as: `append` leaves them as initialized, the other operators copy layers in use
            (see `layerwise.edit.growth`). The optimizer's moments are not copied.
        unroll: how deep the layers in use run in a forward of training, by running each several times in a row (the interpolation
            map): `none`, as they are; `full`, always the full depth; or drawn anew for every micro-batch, see `unrolled_depth`.
        settle: share of every later stage, at its beginning, in which only the new layers (and embedding and head) are trained.
            1 never trains a layer again; the optimizer then drops its moments.
        detach: while settling, nothing flows back below the new layers: what is below is not trained at all.

    Sources: McGill-DMaS 2024, "On the Effectiveness of Incremental Training of Large Language Models" (arXiv 2411.18700), section 3;
    Pan et al. 2024 (arXiv 2401.09192); Bochkov 2025, "Growing Transformers" (arXiv 2507.07129).
    """

    def __init__(
        self,
        *,
        depths: Sequence[int],
        starts: Sequence[float] | None = None,
        new: Where = "append",
        unroll: Unroll = "none",
        settle: float = 0.0,
        detach: bool = False,
    ) -> None:
        self.depths = list(depths)
        self.starts = [i / len(self.depths) for i in range(len(self.depths))] if starts is None else list(starts)
        if not self.depths or self.depths[0] < 1 or any(a >= b for a, b in zip(self.depths, self.depths[1:], strict=False)):
            raise BadInput(f"depths grow from at least 1; they are {self.depths}")
        if len(self.starts) != len(self.depths) or self.starts[0] != 0 or self.starts != sorted(set(self.starts)) or self.starts[-1] >= 1:
            raise BadInput(
                f"starts holds one share of the steps for each of the {len(self.depths)} depths, rising from 0; got {self.starts}"
            )
        if not 0 <= settle <= 1:
            raise BadInput(f"settle is a share of a stage, in [0, 1]; it is {settle}")
        for old, wide in zip(self.depths, self.depths[1:], strict=False):
            sources(old, wide, new)
        self.new, self.unroll, self.settle, self.detach = new, unroll, settle, detach
        self.around: tuple[Around, ...] = (self._run_layer,)
        self._trained: list[nn.Parameter] = []
        self._counts: list[int] = []

    def start(self, run: Run) -> None:
        depth = run.model.stack.depth
        if self.depths[-1] != depth:
            raise BadInput(
                f"growth ends with depth {self.depths[-1]}, but the stack has {depth} layers: the last of depths must be {depth}"
            )
        bounds = [round(share * run.total) for share in self.starts]
        if len(set(bounds)) != len(bounds) or bounds[-1] >= run.total:
            raise BadInput(f"{run.total} steps are too few for stages that begin at {self.starts}")
        self.bounds = [*bounds, run.total]
        self._trained = [p for p in run.model.stack.layers.parameters() if p.requires_grad]

    def stage_at(self, step: int) -> tuple[int, bool]:
        """The stage that a step (from 0) belongs to, and whether its older layers are at rest."""
        stage = max(i for i, start in enumerate(self.bounds[:-1]) if start <= step)
        rest = round(self.settle * (self.bounds[stage + 1] - self.bounds[stage]))
        return stage, stage > 0 and step < self.bounds[stage] + rest

    def before_step(self, run: Run) -> None:
        stage, self._resting = self.stage_at(run.step)
        self._old = self.depths[stage - 1] if stage else 0
        self._now = self.depths[stage]
        layers = run.model.stack.layers
        # A checkpoint taken at a boundary holds the layers before they are copied; any later one holds them after.
        if stage and run.step == self.bounds[stage]:
            spread(layers, self._old, self._now, self.new)
        resting = {id(p) for layer in layers[: self._old] for p in layer.parameters()} if self._resting else set()
        for parameter in self._trained:
            parameter.requires_grad_(id(parameter) not in resting)
            if self.settle == 1.0 and id(parameter) in resting:
                run.optimizer.state.pop(parameter, None)
        # All ranks draw the same depths.
        self._generator = torch.Generator().manual_seed((run.seed * 1_000_003 + run.step) & 0x7FFF_FFFF)

    def _run_layer(self, i: int, layer: Any, x: Tensor, ctx: Context, call: Call) -> Tensor:
        if i == 0:
            u = torch.rand((), generator=self._generator, dtype=torch.float64).item()
            depth = unrolled_depth(1e-6 + (1 - 1e-6) * u, self._now, self.depths[-1], self.unroll)
            self._counts = repetitions(self._now, depth, self.depths[-1])
        if self.detach and self._resting and i == self._old:
            x = x.detach()
        for _ in range(self._counts[i]):
            x = call(x, ctx)
        return x

    def validations(self) -> dict[str, tuple[Around, ...]]:
        def to(depth: int) -> Around:
            counts = repetitions(self._now, depth, self.depths[-1])

            def run_layer(i: int, layer: Any, x: Tensor, ctx: Context, call: Call) -> Tensor:
                for _ in range(counts[i]):
                    x = call(x, ctx)
                return x

            return run_layer

        named: dict[str, tuple[Around, ...]] = {"val_loss": (to(self._now),)}
        if self.unroll != "none":
            named["val_loss_unrolled"] = (to(self.depths[-1]),)
        return named

    def end(self, run: Run) -> None:
        for parameter in self._trained:
            parameter.requires_grad_(True)


def repetitions(layers: int, depth: int, total: int) -> list[int]:
    """How often each of `total` layers runs when the lowest `layers` are unrolled to `depth` by interpolation."""
    chosen = sources(layers, depth, "interpolate")
    return [chosen.count(i) for i in range(total)]
