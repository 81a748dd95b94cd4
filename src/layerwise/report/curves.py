"""Training values as columns a page can draw: grouped, thinned to what a screen can show, rounded to what an eye can see."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from layerwise.report.read import Run

POINTS = 800
"""Most points of one curve; more steps are thinned evenly."""
LABELS = ("variant", "seed", "stage")
AXES = ("step", "tokens", "seconds")


def curves(run: Run) -> list[dict[str, Any]]:
    """Blocks `{variant, seed, stage, step, tokens, seconds, values: {key: [...]}}`; keys logged at the same steps share a block.

    All seeds of a variant are thinned to the same steps, so that means over seeds stay means over all of them.
    """
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in run.lines:
        groups[line["variant"], line["seed"], line["stage"]].append(line)
    steps: dict[tuple[str, str, str], set[float]] = defaultdict(set)  # of (variant, stage, key) over all seeds
    for (variant, _, stage), lines in groups.items():
        for line in lines:
            for key in _keys(line):
                steps[variant, stage, key].add(line["step"])
    kept = {key: _thinned(sorted(found)) for key, found in steps.items()}
    blocks = []
    for (variant, seed, stage), lines in groups.items():
        lines.sort(key=lambda line: line["step"])
        keys = list(dict.fromkeys(key for line in lines for key in _keys(line)))
        together: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for key in keys:
            there = [i for i, line in enumerate(lines) if _is_number(line.get(key))]
            chosen = tuple(i for i in there if lines[i]["step"] in kept[variant, stage, key] or i == there[-1])
            together[chosen].append(key)
        for chosen, names in together.items():
            block: dict[str, Any] = {"variant": variant, "seed": seed, "stage": stage}
            block |= {axis: [_rounded(lines[i].get(axis)) for i in chosen] for axis in AXES}
            block["values"] = {name: [_rounded(lines[i][name]) for i in chosen] for name in names}
            blocks.append(block)
    return blocks


def _keys(line: dict[str, Any]) -> list[str]:
    return [key for key, value in line.items() if key not in LABELS and key not in AXES and _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _thinned(steps: list[float]) -> set[float]:
    stride = -(-len(steps) // POINTS)
    return {*steps[::stride], steps[-1]}


def _rounded(value: Any) -> float | int | None:
    return float(f"{value:.6g}") if isinstance(value, float) else value if _is_number(value) else None
