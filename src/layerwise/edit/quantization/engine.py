"""The calibration engine: from the first layer to the last, with the full-precision and the quantized stream side by side."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.edit.quantization.gptq import gptq, rtn
from layerwise.edit.quantization.moments import Moments, corrected
from layerwise.edit.quantization.passage import GROUPS, Passage
from layerwise.edit.quantization.scaling import Clip, Scale, clipped, scale_group, scale_layer
from layerwise.edit.quantization.tokens import Tokens, token_scores, token_weights
from layerwise.evaluate.batches import inference, split_of
from layerwise.models.model import Model
from layerwise.nn.integers import Grid
from layerwise.nn.linears.lowrank import LowRank
from layerwise.safetensor import load_tensors, save_tensors
from layerwise.stack.context import Context

Codes = tuple[Tensor, Grid]


@dataclass(frozen=True)
class Recipe:
    """How matrices are rounded; see `layerwise.edit.quantization.quantize.quantize` for the options."""

    method: Literal["rtn", "gptq"] = "gptq"
    group: int | None = None
    symmetric: bool = False
    clip: Clip = False
    act_order: bool = False
    damping: float = 0.01
    scale: Scale | None = None
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
        return self.scale is not None or self.reads

    @property
    def reads(self) -> bool:
        """Whether a group of matrices needs the second moments of its inputs when its turn comes."""
        return self.method != "rtn" or bool(self.propagate) or self.clip == "awq"

    def grid(self) -> dict[str, Any]:
        """What `find_grid` is told, without the bits."""
        return {"group": self.group, "symmetric": self.symmetric, "clip": self.clip is True}


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
    """Group after group is corrected, scaled and rounded, on what the groups rounded before it make of the inputs.

    Scales are searched on the weights that are to be rounded: where none is corrected, those of all groups before any is rounded.
    """
    recipe, codes = state.recipe, {}
    now = Passage(index, copy.deepcopy(layer), state.quantized, state.contexts)
    full = None if state.full is None else Passage(index, layer, state.full, state.contexts)
    if bits < 16:
        if recipe.scale and not recipe.propagate:
            scale_layer(now, recipe.scale, bits=bits, **recipe.grid())
        weights = [_weights(now, state, i) for i in range(len(state.quantized))] if recipe.tokens else None
        for side, roles in GROUPS:
            linears = now.group(side, roles)
            moments = _moments(now, full if recipe.propagate else None, side, next(iter(linears)), weights) if recipe.reads else None
            matrices = {role: linear.weight.detach().float() for role, linear in linears.items() if not isinstance(linear, LowRank)}
            for role in linears.keys() - matrices.keys():
                codes[side, f"{role}.factor_a"], codes[side, f"{role}.factor_b"] = _rounded_factors(linears[role], bits, moments, recipe)
            if moments is not None and recipe.propagate:  # of no low-rank linear: see `preview_quantize`
                matrices = _corrected(matrices, moments, recipe)
                if recipe.scale:
                    matrices = _scaled(now, linears, matrices, moments, bits, recipe, codes)
            for role, (made, grid) in _rounded(matrices, bits, moments, recipe).items():
                codes[side, role] = made, grid
                linears[role].weight.data = grid.values(made).to(linears[role].weight.dtype)
    lost, whole = 0.0, 0.0
    for i in range(len(state.quantized)):
        state.quantized[i] = x = now.out(i)
        if state.full is not None and full is not None:
            state.full[i] = y = full.out(i)
            lost += float((y - x).float().square().sum())
            whole += float(y.float().square().sum())
    return Quantized(codes, now.layer, lost / whole if state.full is not None and whole else None)


def _weights(at: Passage, state: _State, i: int) -> Tensor:
    """The weights of a batch's tokens in a layer that is not quantized yet."""
    kind = state.recipe.tokens
    assert kind is not None
    scores = token_scores(kind, at.layer, at.stream[i], at.contexts[i], at.index, state.ids[i], state.frequency, state.generator)
    floor = 0.0 if kind in ("first", "first-last") else state.recipe.floor
    return token_weights(scores, at.real(i), floor=floor, exponent=state.recipe.exponent)


def _moments(now: Passage, full: Passage | None, side: str, role: str, weights: list[Tensor] | None) -> Moments:
    """Second moments of what a group reads; against what it reads in the full-precision network, where that is given."""
    linear = now.group(side, (role,))[role]
    moments = Moments(linear.in_features, next(linear.parameters()).device)
    for i in range(len(now.stream)):
        real = now.real(i)
        given = weights[i] if weights is not None else None if real is None else real.float()
        moments.add(now.read(i, linear)[0], given, None if full is None else full.read(i, full.group(side, (role,))[role])[0])
    return moments


def _corrected(matrices: dict[str, Tensor], moments: Moments, recipe: Recipe) -> dict[str, Tensor]:
    if "down" in matrices and not recipe.propagate_down:
        return matrices
    whole = corrected(torch.cat(list(matrices.values())), moments.hessian, moments.cross, recipe.propagate, recipe.propagate_damping)
    return _parted(whole, matrices)


def _scaled(
    at: Passage,
    linears: dict[str, Any],
    matrices: dict[str, Tensor],
    moments: Moments,
    bits: int,
    recipe: Recipe,
    codes: dict[tuple[str, str], Codes],
) -> dict[str, Tensor]:
    """A group's matrices scaled, and the moments of what it reads with them. Of a matrix before it, rounded already, the ranges are divided."""
    assert recipe.scale is not None
    scale = scale_group(at, linears, matrices, moments, recipe.scale, bits=bits, **recipe.grid())
    if scale is None:
        return matrices
    moments.hessian /= scale[:, None] * scale
    before = ("mixer", "v") if "o" in linears else ("ffn", "up") if "down" in linears else None
    if before is not None:
        made, grid = codes[before]
        codes[before] = made, (grid := grid.divided(scale))
        weight = at.group(before[0], before[1:])[before[1]].weight
        weight.data = grid.values(made).to(weight.dtype)
    return {role: matrix * scale for role, matrix in matrices.items()}


def _rounded(matrices: dict[str, Tensor], bits: int, moments: Moments | None, recipe: Recipe) -> dict[str, Codes]:
    """The matrices of a group, rounded as one: they read the same inputs, and rows do not see each other.

    AWQ cuts off the largest numbers of all but q and k, whose outputs are multiplied with each other.
    """
    if not matrices:
        return {}
    if recipe.clip == "awq" and moments is not None:
        matrices = {r: w if r in "qk" else clipped(w, moments.hessian, bits, **recipe.grid()) for r, w in matrices.items()}
    codes, grid = _nearest(torch.cat(list(matrices.values())), bits, None if moments is None else moments.hessian, recipe)
    parts = [_parted(whole, matrices).values() for whole in (codes, grid.scales, grid.zeros)]
    return {role: (code, dataclasses.replace(grid, scales=s, zeros=z)) for role, code, s, z in zip(matrices, *parts, strict=True)}


def _parted(whole: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of matrices that were put one below the other."""
    return dict(zip(like, whole.split([len(m) for m in like.values()]), strict=True))


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


def recipe_of(**options: Any) -> Recipe:
    """The recipe among an edit's options."""
    known = {f.name for f in dataclasses.fields(Recipe)}
    return Recipe(**{name: value for name, value in options.items() if name in known})
