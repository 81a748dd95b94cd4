"""A run, or one inspected model, as one HTML file that needs nothing else: style, scripts and data are inside."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from layerwise.files import write_file
from layerwise.report import wording
from layerwise.report.curves import curves
from layerwise.report.history import depths, histories
from layerwise.report.read import Finished, Run, finite, read_run
from layerwise.report.result import difference, measured, relations, rows

HERE = Path(__file__).parent
PER_LAYER = re.compile(r"/-?\d+$")
"""How the key of a per-layer series ends: `rotation/3`; -1 is what lies before the layers."""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page about a run folder and return its path.

    Args:
        run: the folder; parts of it may be missing. out: the file to write (default: `report.html` in the folder).

    Raises:
        BadInput: `run` is no folder or holds nothing of a run.
    """
    page = rendered(_run_context(read_run(run)))
    return write_file(out or run / "report.html", page)


def write_inspect_page(findings: dict[str, Any], out: Path, title: str, subtitle: str = "") -> Path:
    """Write a page with the metrics, per-layer tables and matrices of one `Findings.data()`, without a run around it."""
    stage = Finished("model", "", "inspect", "analyze", "inspect", findings=finite(findings))
    data = {"variants": [{"name": "model", "colour": 0}], "seeds": [""], "stages": ["inspect"], **_found([stage], {})}
    metrics = {name: wording.number(value) for name, value in (findings.get("metrics") or {}).items()}
    page = rendered(
        {
            "title": title,
            "subtitle": subtitle,
            "command": "layerwise inspect",
            "metrics": metrics,
            "notes": list(findings.get("notes") or []),
            "data": data,
        }
    )
    return write_file(out, page)


def rendered(context: dict[str, Any]) -> bytes:
    """The page about what the context holds."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {name: getattr(wording, name) for name in ("number", "decimals", "interval", "duration", "size")}
    text = environment.get_template("template.html").render(
        **{**context, "data": embedded(context["data"]), "data_has": _has(context["data"])},
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        scripts=Markup("\n".join((HERE / name).read_text(encoding="utf-8") for name in ("plots.js", "controls.js", "page.js"))),
    )
    return text.encode("utf-8", errors="replace")


def embedded(data: Any) -> Markup:
    """JSON that can stand inside a script element: no character in it can end the element or begin a comment."""
    text = json.dumps(finite(data), allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _has(data: dict[str, Any]) -> dict[str, bool]:
    """Which sections there is something to draw for."""
    keys = {key for block in data.get("curves", []) for key in block["values"]}
    return {
        "curves": any(not PER_LAYER.search(key) for key in keys),
        "series": any(PER_LAYER.search(key) for key in keys),
        "layer_tables": any(table["layers"] for table in data["tables"]),
        "other_tables": any(not table["layers"] for table in data["tables"]),
        "matrices": bool(data["matrices"]),
    }


def _run_context(run: Run) -> dict[str, Any]:
    job, receipt = run.job, run.receipt or {}
    values = measured(run)
    table = rows(run, values)
    delta = difference(run, values)
    key = wording.verdict_key(run.receipt, run.claim, run.scale)
    related = relations(run, values)
    known = depths(run)
    blocks = [block | {"depth": known.get((block["variant"], block["seed"], block["stage"]))} for block in curves(run)]
    colours = _colours(run)
    claimed = (run.claim or {}).get("metric")
    data = {
        "variants": [{"name": name, "colour": colours[name]} for name in run.variants],
        "seeds": run.seeds,
        "stages": run.stage_names,
        "values": values,
        "claimed": claimed,
        "direction": (run.claim or {}).get("direction"),
        "summary": {name: {"mean": arm.get("mean"), "ci95": arm.get("ci95")} for name, arm in (receipt.get("variants") or {}).items()},
        "difference": delta,
        "relations": related,
        "curves": blocks,
        **_found(run.stages, known),
    }
    notes = list(dict.fromkeys([*receipt.get("notes", []), *(note for s in run.stages for note in s.findings.get("notes") or [])]))
    return {
        "title": job.get("title") or run.name,
        "run": run,
        "job": job,
        "paper": _paper(job.get("paper")),
        "verdict": {"key": key, "word": wording.VERDICTS[key][0], "meaning": wording.VERDICTS[key][1]},
        "scale_note": wording.SCALES.get(run.scale, ""),
        "state_note": wording.STATES.get(run.state, ""),
        "claim": run.claim,
        "delta": delta,
        "relations": related,
        "table": table,
        "values": values,
        "metric_rows": _metric_rows(values, [row.variant for row in table]),
        "colours": colours,
        "histories": histories(run),
        "timeline": _timeline(run),
        "samples": _samples(run),
        "environment": receipt.get("environment") or {},
        "sources": [source for source in receipt.get("data") or [] if isinstance(source, dict)],
        "notes": notes,
        "problems": run.problems,
        "data": data,
    }


def _colours(run: Run) -> dict[str, int]:
    """A place in the palette for every variant; method and baseline always have the first two."""
    claim = run.claim or {}
    roles = [claim.get("method"), claim.get("baseline")] if run.claim else []
    order = [name for name in roles if name in run.variants]
    order += [name for name in run.variants if name not in order]
    return {name: place for place, name in enumerate(order)}


def _found(stages: list[Finished], known: dict[tuple[str, str, str], int]) -> dict[str, Any]:
    """Tables and matrices of all stages, for the page's selectors. Generated text is shown elsewhere."""
    tables, matrices = [], []
    for s in stages:
        place = {"variant": s.variant, "seed": s.seed, "stage": s.stage}
        for table in s.findings.get("tables") or []:
            columns, body = table.get("columns") or [], table.get("rows") or []
            if not columns or columns == ["prompt", "text"]:
                continue
            layers = str(columns[0]).lower() == "layer"
            if layers:
                body = [[layer_label(row[0], known.get((s.variant, s.seed, s.stage))), *row[1:]] for row in body if row]
            tables.append({**place, "title": str(table.get("title", "")), "layers": layers, "columns": columns, "rows": body})
        matrices += [{**place, **matrix} for matrix in s.findings.get("matrices") or [] if matrix.get("values")]
    return {"tables": tables, "matrices": matrices}


def layer_label(index: Any, depth: int | None) -> str:
    """Depth -1 is what lies before the layers, their number what lies after them."""
    return "embedding" if index == -1 else "head" if depth is not None and index == depth else str(index)


def _metric_rows(values: dict[str, dict[str, dict[str, float]]], variants: list[str]) -> list[dict[str, Any]]:
    """Mean over seeds of every metric by variant."""
    return [
        {
            "metric": metric,
            "cells": [(sum(seeds.values()) / len(seeds), len(seeds)) if (seeds := of.get(name)) else None for name in variants],
        }
        for metric, of in values.items()
    ]


def _timeline(run: Run) -> list[dict[str, Any]]:
    """Stages in order, each with its mean seconds by variant and how many seeds reused an earlier result."""
    lines: list[dict[str, Any]] = []
    for name in run.stage_names:
        cells: dict[str, dict[str, Any]] = {}
        for variant in run.variants:
            done = [s for s in run.stages if s.stage == name and s.variant == variant]
            times = [s.seconds for s in done if s.seconds is not None]
            seconds = sum(times) / len(times) if times else None
            if done:
                cells[variant] = {"seconds": seconds, "seeds": len(done), "reused": sum(s.reused for s in done)}
        kinds = list(dict.fromkeys((s.kind, s.name) for s in run.stages if s.stage == name))
        lines.append({"stage": name, "kinds": kinds, "cells": cells})
    longest = max((c["seconds"] or 0.0 for line in lines for c in line["cells"].values()), default=0.0)
    for cell in (c for line in lines for c in line["cells"].values()):
        cell["share"] = 100 * (cell["seconds"] or 0.0) / longest if longest else 0.0
    return lines


def _samples(run: Run) -> list[dict[str, Any]]:
    """Generated text by stage and prompt: what every variant and seed wrote."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for s in run.stages:
        for table in s.findings.get("tables") or []:
            if table.get("columns") == ["prompt", "text"]:
                for prompt, text in table.get("rows") or []:
                    text = str(text).removeprefix(str(prompt))
                    found.setdefault((s.stage, str(prompt)), []).append({"variant": s.variant, "seed": s.seed, "text": text})
    samples = []
    for (stage, prompt), texts in found.items():
        first: dict[str, dict[str, str]] = {}
        for text in texts:
            first.setdefault(text["variant"], text)
        shown = sorted(first.values(), key=lambda t: run.variants.index(t["variant"]))
        samples.append({"stage": stage, "prompt": prompt, "first": shown, "others": [t for t in texts if t not in shown]})
    return samples


def _paper(paper: Any) -> dict[str, Any] | None:
    """The paper with a safe link, from its address or its arXiv number."""
    if not isinstance(paper, dict) or not paper.get("title"):
        return None
    url, arxiv = str(paper.get("url") or ""), str(paper.get("arxiv") or "")
    if not url.startswith(("https://", "http://")):
        url = f"https://arxiv.org/abs/{quote(arxiv)}" if arxiv else ""
    return {**paper, "url": url, "arxiv": arxiv}
