"""Re-checking a committed receipt: its verdict from its values, and with a new run its values too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layerwise.errors import BadInput
from layerwise.jobs.catalogue import find, receipt_data
from layerwise.jobs.receipt import Receipt, judged, related
from layerwise.jobs.run import run_job
from layerwise.jobs.schema import SCALES, Scale, read_job
from layerwise.table import unknown

TOLERANCE = 1e-9


def verify(name: str, scale: Scale, *, rerun: Path | None = None, data_dir: Path | None = None, device: str = "cpu") -> dict[str, Any]:
    """Recompute what a receipt says from its values; with `rerun` (a new folder), run the system again and compare.

    Returns:
        `{"system", "scale", "ok", "verdict", "recomputed", "problems": [...]}`, with `rerun_verdict` and
        `largest_change` (of a value, relative) after a new run.

    Raises:
        BadInput: there is no receipt, or it is not one.
    """
    if scale not in SCALES:
        raise unknown(str(scale), SCALES, "scale")
    find(name)
    data = receipt_data(name, scale)
    if data is None:
        raise BadInput(f"there is no {scale} receipt of '{name}': run 'layerwise run {name} --scale {scale}' and keep its receipt.json")
    try:
        receipt = Receipt.model_validate(data)
    except ValidationError as error:
        raise BadInput(f"the {scale} receipt of '{name}' is malformed: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
    job = read_job(find(name), scale=scale)
    fresh = receipt.model_copy(deep=True)
    for arm in fresh.variants.values():
        arm.mean = arm.std = arm.ci95 = None
    if receipt.claim is not None and not {receipt.claim.method, receipt.claim.baseline} <= set(receipt.variants):
        raise BadInput(f"the {scale} receipt of '{name}' lacks a variant that its claim compares")
    difference, verdict = judged(receipt.claim, receipt.scale, fresh.variants)
    problems = []
    if (receipt.system, receipt.scale) != (name, scale):
        problems.append(f"the receipt is of '{receipt.system}' at scale {receipt.scale}")
    if receipt.claim != job.claim:
        problems.append("the job's claim differs from the receipt's")
    if set(receipt.variants) != set(job.variants):
        problems.append(f"the job has variants {sorted(job.variants)}, the receipt {sorted(receipt.variants)}")
    if verdict != receipt.verdict:
        problems.append(f"the values imply '{verdict}', the receipt says '{receipt.verdict}'")
    said, implied = (d.model_dump() if d else {} for d in (receipt.difference, difference))
    if said.keys() != implied.keys() or any(_off(said[key], implied[key]) for key in said):
        problems.append("the difference does not follow from the values")
    for n, arm in receipt.variants.items():
        for field, word in (("mean", "mean"), ("std", "standard deviation"), ("ci95", "interval")):
            if _off(getattr(arm, field), getattr(fresh.variants[n], field)):
                problems.append(f"the {word} of '{n}' does not follow from its values")
        missing = [s for s in job.seeds if str(s) not in arm.values and s not in (*arm.diverged, *arm.unreached)] if receipt.claim else []
        if missing:
            problems.append(f"'{n}' has no value for seed {', '.join(map(str, missing))} of the job, and does not say why")
        measured = receipt.metrics.get(n, {})
        same = [v for m, v in measured.items() if receipt.claim and (m == receipt.claim.metric or m.endswith(f".{receipt.claim.metric}"))]
        if same and not any(all(not _off(v.get(s), value) for s, value in arm.values.items()) for v in same):
            problems.append(f"the values of '{n}' are not those of its metric")
    if [related(relation, receipt.metrics) for relation in job.relations] != receipt.relations:
        problems.append("the relations do not follow from the metrics")
    result: dict[str, Any] = {"system": name, "scale": scale, "verdict": receipt.verdict, "recomputed": verdict}
    if rerun is not None:
        again = run_job(job, rerun, data_dir=data_dir, device=device)
        changes = [
            abs(again.variants[n].values[s] - v) / max(abs(v), 1e-12)
            for n, arm in receipt.variants.items()
            for s, v in arm.values.items()
            if n in again.variants and s in again.variants[n].values
        ]
        result |= {"rerun_verdict": again.verdict, "largest_change": max(changes, default=None)}
        if again.verdict != receipt.verdict:
            problems.append(f"run again it is '{again.verdict}', the receipt says '{receipt.verdict}'")
    return {**result, "ok": not problems, "problems": problems}


def _off(a: Any, b: Any) -> bool:
    """Whether two numbers, or two pairs of them, differ; None only equals None."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) != len(b) or any(_off(x, y) for x, y in zip(a, b, strict=True))
    return (a is None) != (b is None) or (a is not None and b is not None and abs(a - b) > TOLERANCE * max(1.0, abs(b)))
