"""A plan as a page: the front of size against loss, every method at each size, what becomes of each layer, and how good the expectations were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerwise.files import write_file
from layerwise.report import wording
from layerwise.report.page import rendered

FIELDS = ("heads", "ffn", "rank", "bits")


def write_plan_page(plan: dict[str, Any], out: Path) -> Path:
    """Write the page about the plain data that `layerwise plan` keeps as plan.json."""
    methods = list(dict.fromkeys(name for t in plan["targets"] for name in t["methods"]))
    order = ["combination", *(m for m in methods if m != "combination")]
    measure = plan["measure"]
    vectors = measure["name"] == "sentence vectors"  # whose loss is their distance
    tables = [
        *([] if vectors else [_sensitivity(plan, "divergence", "Divergence of the predictions")]),
        _sensitivity(plan, "added", "Loss added"),
        *(_layers(t) for t in plan["targets"]),
    ]
    place = {"variant": order[0], "seed": "", "stage": "plan"}
    data = {
        "variants": [{"name": name, "colour": i} for i, name in enumerate(order)],
        "seeds": [""],
        "stages": ["plan"],
        "tables": [{**place, **table} for table in tables],
        "matrices": [],
        "relations": [_relation(plan, order)],
        "front": _front(plan),
    }
    tiles = {"bytes as it is": plan["bytes"], "held-out loss as it is": plan["held_out"]}
    tiles |= {"ms as it is": plan["ms"]} if plan["ms"] is not None else {}
    tiles |= {f"held-out loss at {t['target']:g}": t["plan"]["held_out"] for t in plan["targets"]}
    context = {
        "title": plan["model"],
        "subtitle": "; ".join(t["sentence"] for t in plan["targets"]) if len(plan["targets"]) == 1 else "",
        "command": "layerwise plan",
        "metrics": {name: wording.number(value) for name, value in tiles.items()},
        "targets": [{**t, "rows": _rows(t)} for t in plan["targets"]],
        "timed": plan["ms"] is not None,
        "colours": {name: i for i, name in enumerate(order)},
        "relations": data["relations"],
        "environment": plan["environment"],
        "sources": plan["data"],
        "notes": [f"Losses are of {measure['name']}: {measure['unit']}.", *plan["notes"]],
        "data": data,
    }
    return write_file(out, rendered(context))


def _rows(target: dict[str, Any]) -> list[dict[str, Any]]:
    """Every method's best at a size, the best of them first, those that cannot reach it last."""
    rows = [
        {**(c or {}), "method": name, "plan": c is not None and c["layers"] == target["plan"]["layers"]}
        for name, c in target["methods"].items()
    ]
    return sorted(rows, key=lambda row: row.get("held_out", float("inf")))


def _front(plan: dict[str, Any]) -> dict[str, Any]:
    """Held-out losses added, of the front and of every method at every size."""
    whole = plan["held_out"]
    line = [c for c in plan["front"] if c["held_out"] is not None]
    points = [
        {"variant": name, "x": c["share"], "y": c["held_out"] - whole, "plan": c["layers"] == t["plan"]["layers"]}
        for t in plan["targets"]
        for name, c in t["methods"].items()
        if c is not None
    ]
    x, y = [c["share"] for c in line], [c["held_out"] - whole for c in line]
    return {"points": points, "line": {"x": x, "y": y}, "targets": [t["target"] for t in plan["targets"]]}


def _sensitivity(plan: dict[str, Any], what: str, title: str) -> dict[str, Any]:
    moves = plan["sensitivity"]
    places = len(moves[0][what])
    names = [str(i) for i in range(places)]
    if any(move["tokens"] is not None for move in moves):
        names[-1] = "tokens"
    rows = [[names[i], *(move[what][i] for move in moves)] for i in range(places)]
    return {"title": f"{title} by one change of one layer", "layers": True, "columns": ["layer", *map(_named, moves)], "rows": rows}


def _named(move: dict[str, Any]) -> str:
    if move["drop"]:
        return "dropped"
    if move["tokens"] is not None:
        return f"tokens {move['tokens']}"
    return next(f"{name} {move[name]:g}" for name in FIELDS if move[name] != (16 if name == "bits" else 1))


def _layers(target: dict[str, Any]) -> dict[str, Any]:
    rows = [
        ["tokens", None, None, None, layer["tokens"]]
        if layer["tokens"] is not None
        else [str(i), *(["dropped", None, None, None] if layer["drop"] else [layer[name] for name in FIELDS])]
        for i, layer in enumerate(target["plan"]["layers"])
    ]
    return {"title": f"The plan at {target['target']:g}", "layers": False, "columns": ["layer", *FIELDS], "rows": rows}


def _relation(plan: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """Measured against expected damage, for all that was tried."""
    points = [
        {"variant": c["method"] if c["method"] in order else order[0], "seed": "", "x": c["predicted"], "y": c["added"], "counts": True}
        for c in plan["tried"]
    ]
    names = {"x": "expected added loss", "y": "measured added loss"}
    return {**names, "spearman": plan["prediction"]["spearman"], "count": len(points), "above": {}, "points": points}
