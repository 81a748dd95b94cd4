"""The calibration engine: from the first layer to the last, with the full-precision and the quantized stream side by side."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerwise.edit.quantization.gptq import gptq, rtn
from layerwise.edit.quantization.moments import Moments, corrected
from layerwise.edit.quantization.scaling import scale_layer
from layerwise.edit.quantization.tokens import Tokens, token_scores, token_weights
from layerwise.evaluate.batches import inference, split_of
from layerwise.models.model import Model
from layerwise.nn.integers import Grid
from layerwise.nn.linears.lowrank import LowRank
from layerwise.safetensor import load_tensors, save_tensors
from layerwise.stack.context import PAD, Context
from layerwise.stack.record import inputs_of

Codes = tuple[Tensor, Grid]
GROUPS = (("mixer", ("q", "k", "v")), ("mixer", ("o",)), ("ffn", ("gate", "up")), ("ffn", ("down",)))
"""The matrices of a layer in the order they are quantized; those of one group read the same inputs."""


@dataclass(frozen=True)
class Recipe:
    """How matrices are rounded; see `layerwise.edit.quantization.quantize.quantize` for the options."""

    method: Literal["rtn", "gptq"] = "gptq"
    group: int | None = None
    symmetric: bool = False
    clip: bool = False
    act_order: bool = False
    damping: float = 0.01
    scale: Literal["awq"] | None = None
    propagate: float = 0.0
    propagate_damping: float = 1.0
    propagate_down: bool = False
    tokens: Tokens | None = None
    floor: float = 0.01
    exponent: float = 1.0
    shifts: int = 1

    @property
    def calibrates(self) -> bool:
        """Whether it looks at data."""
        return self.method != "rtn" or self.scale is not None or bool(self.propagate)

    def grid(self) -> dict[str, Any]:
        """What `find_grid` is told, without the bits."""
        return {"group": self.group, "symmetric": self.symmetric, "clip": self.clip}


@dataclass
class Quantized:
    """A layer after quantization.

    Attributes:
        codes: (branch, role) -> codes and grid; of a low-rank matrix both factors, as `role.factor_a` and `role.factor_b`. Empty for a layer
            that stays as it is.
        layer: a copy with the rounded matrices, dense.
        error: of the stream that leaves it, ||x_full - x||^2 / ||x_full||^2; None when no reference is carried.
    """

    codes: dict[tuple[str, str], Codes]
    layer: Any
    error: float | None


class Streams:
    """The activations that enter the next layer, one tensor a batch: in memory, or each in a file of `folder`."""

    def __init__(self, tensors: Sequence[Tensor], folder: Path | None = None) -> None:
        self.kept: list[Tensor | None] = [None] * len(tensors)
        self.folder, self.device = folder, str(tensors[0].device) if tensors else "cpu"
        for i, tensor in enumerate(tensors):
            self[i] = tensor

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> Tensor:
        found = self.kept[i] if self.folder is None else load_tensors(self.folder / f"{i}.safetensors", self.device)["x"]
        assert found is not None
        return found

    def __setitem__(self, i: int, x: Tensor) -> None:
        if self.folder is None:
            self.kept[i] = x
        else:
            save_tensors(self.folder / f"{i}.safetensors", {"x": x})


def quantized_layers(
    model: Model,
    data: Any,
    bits: Sequence[int],
    recipe: Recipe,
    *,
    samples: int = 64,
    batch: int = 8,
    split: str = "train",
    spill: bool = False,
    seed: int = 0,
    reference: bool = False,
) -> Iterator[Quantized]:
    """The layers of a model one after another, quantized to `bits` (16: left as they are).

    Within a layer each group of matrices sees inputs made by the groups quantized before it; the whole layer then passes both streams on. What
    is held at a time is one layer twice, and the activations between two layers.

    Args:
        samples: calibration rows, drawn with `seed` from `split`. batch: rows at a time.
        spill: keep activations on disk. reference: carry the full-precision stream even where the recipe needs none.
    """
    with inference(model), tempfile.TemporaryDirectory() as folder:
        rows = calibration_rows(data, samples, batch, split, recipe.shifts, seed, model.device) if recipe.calibrates or reference else []
        entered = [enter(model, r) for r in rows]
        contexts = [ctx for _, ctx in entered]
        ids = [r.get("input_ids") for r in rows]
        both = [Path(folder) / name if spill else None for name in ("quantized", "full")]
        for place in both:
            if place is not None:
                place.mkdir()
        state = _State(recipe, contexts, ids, Streams([x for x, _ in entered], both[0]), None, torch.Generator().manual_seed(seed))
        if recipe.propagate or reference:
            state.full = Streams([x for x, _ in entered], both[1])
        del entered
        if recipe.tokens == "rare":
            state.frequency = torch.bincount(torch.cat([i.flatten() for i in ids if i is not None]))
        for index, layer in enumerate(model.stack.layers):
            yield _quantize_layer(index, layer, bits[index], state)


def calibration_rows(
    data: Any, samples: int, batch: int, split: str, shifts: int, seed: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Rows drawn from a split, in batches; with `shifts`, every row also turned around by 1/shifts, 2/shifts ... of its length."""
    rows = split_of(data, split)
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples]
    made = []
    for part in chosen.split(batch):
        given = {name: value.to(device) for name, value in rows.batch(part).items() if name != "labels"}
        made += [given if turn == 0 else shifted(given, turn, shifts) for turn in range(shifts)]
    return made


def shifted(rows: dict[str, Tensor], turn: int, shifts: int) -> dict[str, Tensor]:
    """Every row turned around by turn/shifts of its length, so that no token is always in an unimportant place."""
    ids = rows["input_ids"]
    return {**rows, "input_ids": ids.roll(turn * ids.shape[1] // shifts, dims=1)}


def enter(model: Model, rows: dict[str, Tensor]) -> tuple[Tensor, Context]:
    """What enters layer 0, and the surroundings in which layers run."""
    caught: list[tuple[Tensor, Context]] = []

    def catch(i: int, layer: Any, x: Tensor, ctx: Context, call: Callable[..., Tensor]) -> Tensor:
        caught.append((x, ctx))
        return x

    model(rows, path=[0], around=(catch,))
    return caught.pop()  # the context knows `catch`, which would keep the activations


@dataclass
class _State:
    recipe: Recipe
    contexts: list[Context]
    ids: list[Tensor | None]
    quantized: Streams
    full: Streams | None
    generator: torch.Generator
    frequency: Tensor | None = None


def _quantize_layer(index: int, layer: Any, bits: int, state: _State) -> Quantized:
    work = copy.deepcopy(layer)
    recipe, codes = state.recipe, {}
    if bits < 16:
        if recipe.scale == "awq":
            hessians, sizes = _magnitudes(index, work, state)
            scale_layer(work, hessians, sizes, bits=bits, **recipe.grid() | {"clip": False})
        original = copy.deepcopy(work) if recipe.propagate else layer
        weights = [_weights(index, work, state, i) for i in range(len(state.quantized))] if recipe.tokens else None
        for side, roles in GROUPS:
            branch = getattr(work, side).branch
            linears = {role: m for role in roles if (m := getattr(branch, role, None)) is not None}
            moments = _moments(index, work, original, side, next(iter(linears)), weights, state) if recipe.calibrates else None
            thin = {role: m for role, m in linears.items() if isinstance(m, LowRank)}
            for role, linear in thin.items():
                codes[side, f"{role}.factor_a"], codes[side, f"{role}.factor_b"] = _rounded_factors(linear, bits, moments, recipe)
            for role, made in _rounded({r: m for r, m in linears.items() if r not in thin}, bits, moments, recipe).items():
                codes[side, role] = made
                linears[role].weight.data = made[1].values(made[0]).to(linears[role].weight.dtype)
    lost, whole = 0.0, 0.0
    for i, ctx in enumerate(state.contexts):
        state.quantized[i] = x = work(state.quantized[i], ctx, (index, 0))
        if state.full is not None:
            state.full[i] = y = layer(state.full[i], ctx, (index, 0))
            lost += float((y - x).float().square().sum())
            whole += float(y.float().square().sum())
    return Quantized(codes, work, lost / whole if state.full is not None and whole else None)


def _rounded(linears: dict[str, Any], bits: int, moments: Moments | None, recipe: Recipe) -> dict[str, Codes]:
    """The matrices of a group, rounded as one: they read the same inputs, and rows do not see each other."""
    if not linears:
        return {}
    rows = [len(m.weight) for m in linears.values()]
    weight = torch.cat([m.weight.detach().float() for m in linears.values()])
    if moments is not None and recipe.propagate and ("down" not in linears or recipe.propagate_down):
        weight = corrected(weight, moments.hessian, moments.cross, recipe.propagate, recipe.propagate_damping)
    codes, grid = _nearest(weight, bits, None if moments is None else moments.hessian, recipe)
    parts = zip(linears, codes.split(rows), grid.scales.split(rows), grid.zeros.split(rows), strict=True)
    return {role: (part, dataclasses.replace(grid, scales=s, zeros=z)) for role, part, s, z in parts}


def _rounded_factors(linear: LowRank, bits: int, moments: Moments | None, recipe: Recipe) -> tuple[Codes, Codes]:
    """Both factors rounded, and put into the linear: the second one on what the first, rounded, makes of the inputs.

    Columns of B first get norm 1, and the rows of A, each with a range of its own, take the rest: so one range serves a row of B.
    """
    norms = linear.factor_b.detach().float().norm(dim=0).clamp(min=1e-12)
    a, b = linear.factor_a.detach().float() * norms[:, None], linear.factor_b.detach().float() / norms
    first = _nearest(a, bits, None if moments is None else moments.hessian, recipe)
    a = first[1].values(first[0])
    second = _nearest(b, bits, None if moments is None else a @ moments.hessian @ a.t(), recipe)
    linear.factor_a.data = a.to(linear.factor_a.dtype)
    linear.factor_b.data = second[1].values(second[0]).to(linear.factor_b.dtype)
    return first, second


def _nearest(weight: Tensor, bits: int, hessian: Tensor | None, recipe: Recipe) -> Codes:
    if recipe.method == "rtn" or hessian is None:
        return rtn(weight, bits, **recipe.grid())
    return gptq(weight, hessian, bits, act_order=recipe.act_order, damping=recipe.damping, **recipe.grid())


def _moments(index: int, work: Any, original: Any, side: str, role: str, weights: list[Tensor] | None, state: _State) -> Moments:
    """Second moments of what a group reads. Where the recipe propagates, against what it reads in the full-precision network."""
    linear = getattr(getattr(work, side).branch, role)
    moments = Moments(linear.in_features, next(linear.parameters()).device)
    for i, ctx in enumerate(state.contexts):
        (x,) = read_by(work, state.quantized[i], ctx, index, linear)
        full = None
        if state.recipe.propagate and state.full is not None:
            (full,) = read_by(original, state.full[i], ctx, index, getattr(getattr(original, side).branch, role))
        moments.add(x, _real_weights(x, ctx) if weights is None else weights[i], full)
    return moments


class _Seen(Exception):
    """All that was to be seen of a layer has been."""


def read_by(layer: Any, x: Tensor, ctx: Context, index: int, *linears: nn.Module) -> list[Tensor]:
    """What some linears of a layer read when the layer runs on `x`; it runs no further than to the last of them."""
    seen: dict[nn.Module, Tensor] = {}

    def see(linear: nn.Module, read: Tensor) -> None:
        seen[linear] = read
        if len(seen) == len(linears):
            raise _Seen

    with inputs_of({linear: linear for linear in linears}, see), contextlib.suppress(_Seen):
        layer(x, ctx, (index, 0))
    return [seen[linear] for linear in linears]


def _real(x: Tensor, ctx: Context) -> Tensor | None:
    """(b, s), False at padding; None where there is none."""
    if ctx.positions is None or not bool((ctx.positions == PAD).any()):
        return None
    return (ctx.positions != PAD).expand(x.shape[:2])


def _real_weights(x: Tensor, ctx: Context) -> Tensor | None:
    real = _real(x, ctx)
    return None if real is None else real.float()


def _weights(index: int, layer: Any, state: _State, i: int) -> Tensor:
    """The weights of a batch's tokens in a layer that is not quantized yet."""
    kind, x, ctx = state.recipe.tokens, state.quantized[i], state.contexts[i]
    assert kind is not None
    scores = token_scores(kind, layer, x, ctx, index, state.ids[i], state.frequency, state.generator)
    floor = 0.0 if kind in ("first", "first-last") else state.recipe.floor
    return token_weights(scores, _real(x, ctx), floor=floor, exponent=state.recipe.exponent)


def _magnitudes(index: int, layer: Any, state: _State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Second moments and mean magnitudes of what q, o, up and down read, on the quantized stream."""
    linears = {"q": layer.mixer.branch.q, "o": layer.mixer.branch.o, "up": layer.ffn.branch.up, "down": layer.ffn.branch.down}
    moments = {role: Moments(m.in_features, m.weight.device) for role, m in linears.items()}
    sizes = {role: torch.zeros(m.in_features, device=m.weight.device) for role, m in linears.items()}
    for i, ctx in enumerate(state.contexts):
        for role, x in zip(linears, read_by(layer, state.quantized[i], ctx, index, *linears.values()), strict=True):
            real = _real_weights(x, ctx)
            moments[role].add(x, real)
            size = x.float().abs() if real is None else x.float().abs() * real[..., None]
            sizes[role] += size.flatten(0, -2).sum(dim=0)
    return {role: m.hessian for role, m in moments.items()}, {role: s / s.mean() for role, s in sizes.items()}


def recipe_of(**options: Any) -> Recipe:
    """The recipe among an edit's options."""
    known = {f.name for f in dataclasses.fields(Recipe)}
    return Recipe(**{name: value for name, value in options.items() if name in known})
