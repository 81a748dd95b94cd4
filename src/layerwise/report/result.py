"""What a run measured and what follows for its claim, as the page shows it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from layerwise.report.read import Run

Values = dict[str, dict[str, dict[str, float]]]
"""metric -> variant -> seed -> value"""


@dataclass
class Row:
    """One variant in the result table."""

    variant: str
    role: str
    values: int
    mean: float | None
    std: float | None
    ci95: list[float] | None
    seconds: float | None
    params: int | None
    peak_bytes: int | None
    diverged: list[str]


def measured(run: Run) -> Values:
    """Every metric of every variant and seed, the claim's first: the receipt's, else what stages found so far."""
    found: Values = {}
    metric = _metric(run)
    for variant, metrics in ((run.receipt or {}).get("metrics") or {}).items():
        for name, values in metrics.items():
            found.setdefault(name, {})[variant] = _numbers(values)
    if not found:
        for stage in run.stages:
            for name, value in _numbers(stage.findings.get("metrics") or {}).items():
                # A claim may name a metric without its stage: the last stage that measures it counts.
                for key in (f"{stage.stage}.{name}", *([name] if name == metric else [])):
                    found.setdefault(key, {}).setdefault(stage.variant, {})[stage.seed] = value
    for variant, arm in ((run.receipt or {}).get("variants") or {}).items():
        values = _numbers(arm.get("values") or {})
        if values:
            found.setdefault(metric, {})[variant] = values
    return {metric: found[metric], **found} if metric in found else found


def rows(run: Run, values: Values) -> list[Row]:
    """The result table: the claim's metric by variant, and what each variant cost."""
    claim = run.claim or {}
    of_claim = values.get(_metric(run), {})
    arms = (run.receipt or {}).get("variants") or {}
    table = []
    for variant in run.variants:
        arm = arms.get(variant) or {}
        seen = list(of_claim.get(variant, {}).values())
        mean, std = arm.get("mean"), arm.get("std")
        if mean is None and seen:
            mean = math.fsum(seen) / len(seen)
            std = math.sqrt(math.fsum((v - mean) ** 2 for v in seen) / (len(seen) - 1)) if len(seen) > 1 else None
        role = "method" if variant == claim.get("method") else "baseline" if variant == claim.get("baseline") else ""
        stages = [s for s in run.stages if s.variant == variant]
        seconds = arm.get("seconds")
        if seconds is None and stages:
            seconds = math.fsum(s.seconds or 0.0 for s in stages) / len({s.seed for s in stages})
        params = arm.get("params") or next((s.after["params"] for s in reversed(stages) if s.after and "params" in s.after), None)
        diverged = [str(seed) for seed in arm.get("diverged") or []]
        if arm or stages:
            shown_std = std if len(seen) > 1 else None
            table.append(Row(variant, role, len(seen), mean, shown_std, arm.get("ci95"), seconds, params, arm.get("peak_bytes"), diverged))
    return table


def difference(run: Run, values: Values) -> dict[str, Any] | None:
    """The paired difference of the claim, method minus baseline, as the receipt has it, with its seeds."""
    claim, found = run.claim, (run.receipt or {}).get("difference")
    if not claim or not found or found.get("mean") is None:
        return None
    of_claim = values.get(_metric(run), {})
    method, baseline = of_claim.get(claim.get("method", ""), {}), of_claim.get(claim.get("baseline", ""), {})
    return {
        "mean": found["mean"],
        "ci95": found.get("ci95"),
        "ratio": found.get("ratio"),
        "pairs": {seed: method[seed] - baseline[seed] for seed in method if seed in baseline},
        **{key: claim.get(key) for key in ("method", "baseline", "metric", "direction", "paper_ratio")},
    }


def relations(run: Run, values: Values) -> list[dict[str, Any]]:
    """How two metrics go together over all variants and seeds: their points, and the rank correlation that the receipt has."""
    found = []
    for relation in (run.receipt or {}).get("relations") or []:
        x, y, above = values.get(relation.get("x"), {}), values.get(relation.get("y"), {}), relation.get("above") or {}
        points = [
            {
                "variant": variant,
                "seed": seed,
                "x": value,
                "y": y[variant][seed],
                "counts": all(values.get(m, {}).get(variant, {}).get(seed, -math.inf) >= least for m, least in above.items()),
            }
            for variant, seeds in x.items()
            for seed, value in seeds.items()
            if seed in y.get(variant, {})
        ]
        if points:
            found.append({**relation, "above": above, "points": points, "count": sum(p["counts"] for p in points)})
    return found


def _metric(run: Run) -> str:
    return str((run.claim or {}).get("metric") or "value")


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {str(k): v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
