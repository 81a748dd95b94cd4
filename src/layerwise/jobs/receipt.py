"""The measured result of a run, as a file others can check."""

from __future__ import annotations

import datetime
import math
import platform
import subprocess
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from layerwise.jobs.schema import Claim, Job, Relation, Scale
from layerwise.jobs.statistics import deviation, mean_interval, rank_correlation, verdict


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Variant(Part):
    """One arm: the claim's metric by seed, and what the arm cost.

    Attributes:
        values: seed -> metric. diverged: seeds whose training diverged and that have no value.
        unreached: seeds that never came down to the loss whose cost is the metric, and that have no value either.
        seconds: mean time of a seed's stages (as first measured; reused stages count what they cost then).
        params: of the final model. peak_bytes: largest memory of a stage.
    """

    values: dict[str, float] = Field(default_factory=dict)
    mean: float | None = None
    std: float | None = None
    ci95: tuple[float, float] | None = None
    seconds: float = 0.0
    params: int = 0
    peak_bytes: int = 0
    diverged: list[int] = Field(default_factory=list)
    unreached: list[int] = Field(default_factory=list)


class Difference(Part):
    """Mean paired difference, method minus baseline, and its 95 % interval."""

    mean: float
    ci95: tuple[float, float] | None = None
    ratio: float | None = None


class Receipt(Part):
    """A run's result; `receipt.json`. Attributes as in the design's example."""

    schema_: Literal[1] = Field(1, alias="schema")
    system: str
    scale: Scale
    claim: Claim | None = None
    variants: dict[str, Variant]
    difference: Difference | None = None
    verdict: Literal["holds", "fails", "inconclusive"] | None = None
    metrics: dict[str, dict[str, dict[str, float]]] = Field(default_factory=dict)
    relations: list[dict[str, Any]] = Field(default_factory=list)
    environment: dict[str, Any] = Field(default_factory=dict)
    data: list[dict[str, str]] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    def dump(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return self.model_dump(by_alias=True, mode="json")


def judged(
    claim: Claim | None, scale: str, variants: dict[str, Variant]
) -> tuple[Difference | None, Literal["holds", "fails", "inconclusive"] | None]:
    """The difference and verdict that the values of a receipt imply."""
    for arm in variants.values():
        values = list(arm.values.values())
        if values:
            arm.mean, arm.ci95 = mean_interval(values)
            arm.std = deviation(values)
    if claim is None:
        return None, None
    method, baseline = variants[claim.method], variants[claim.baseline]
    pairs = [s for s in method.values if s in baseline.values]
    difference = None
    if pairs:
        mean, interval = mean_interval([method.values[s] - baseline.values[s] for s in pairs])
        base = math.fsum(baseline.values[s] for s in pairs)
        ratio = math.fsum(method.values[s] for s in pairs) / base if base else None
        difference = Difference(mean=mean, ci95=interval, ratio=ratio)
    if scale == "smoke":
        return difference, "inconclusive"
    if method.diverged or method.unreached:
        return difference, "fails"
    return difference, verdict([method.values[s] - baseline.values[s] for s in pairs], claim.direction)


def make_receipt(
    job: Job, variants: dict[str, Variant], metrics: dict[str, dict[str, dict[str, float]]], data: list[dict[str, str]], device: str
) -> Receipt:
    """The receipt of a finished run."""
    difference, found = judged(job.claim, job.scale, variants)
    notes = list(job.notes)
    if job.scale == "smoke":
        notes.append("Smoke scale only shows that the path works; it claims nothing.")
    diverged = [f"{name}: seeds {arm.diverged}" for name, arm in variants.items() if arm.diverged]
    if diverged:
        notes.append(f"Training diverged and left no value for {'; '.join(diverged)}.")
    unreached = [f"{name}: seeds {arm.unreached}" for name, arm in variants.items() if arm.unreached]
    if unreached:
        notes.append(f"The loss aimed at was not reached, and there is no value, for {'; '.join(unreached)}.")
    return Receipt(
        schema=1, system=job.name, scale=job.scale, claim=job.claim, variants=variants, difference=difference, verdict=found,
        metrics=metrics, relations=[related(r, metrics) for r in job.relations], environment=environment(device), data=data, notes=notes,
    )  # fmt: skip


def related(relation: Relation, metrics: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Spearman's rank correlation of two metrics over every arm and seed that reaches the relation's conditions."""
    points = []
    for arm in metrics.values():
        for seed in arm.get(relation.x, {}):
            if seed in arm.get(relation.y, {}) and all(arm.get(m, {}).get(seed, -math.inf) >= least for m, least in relation.above.items()):
                points.append((arm[relation.x][seed], arm[relation.y][seed]))
    return {**relation.model_dump(), "points": len(points), "spearman": rank_correlation(points)}


def environment(device: str) -> dict[str, Any]:
    """What the run ran on."""
    from layerwise import __version__

    gpu = torch.cuda.get_device_name(torch.device(device)) if torch.device(device).type == "cuda" else None
    return {
        "layerwise": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        **({"gpu": gpu} if gpu else {}),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def commit() -> str | None:
    """The commit of the source this runs from, marked when files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--", "src"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if dirty else "")
