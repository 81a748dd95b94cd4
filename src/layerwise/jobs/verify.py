"""Re-checking a committed receipt: its verdict from its values, and with a new run its values too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layerwise.errors import BadInput
from layerwise.jobs.catalogue import find, receipt_data
from layerwise.jobs.receipt import Receipt, judged
from layerwise.jobs.run import run_job
from layerwise.jobs.schema import Scale, read_job

TOLERANCE = 1e-9


def verify(name: str, scale: Scale, *, rerun: Path | None = None, data_dir: Path | None = None, device: str = "cpu") -> dict[str, Any]:
    """Recompute what a receipt says from its values; with `rerun` (a new folder), run the system again and compare.

    Returns:
        `{"system", "scale", "ok", "verdict", "recomputed", "problems": [...]}`, with `rerun_verdict` and
        `largest_change` (of a value, relative) after a new run.

    Raises:
        BadInput: there is no receipt, or it is not one.
    """
    data = receipt_data(name, scale)
    if data is None:
        raise BadInput(f"there is no {scale} receipt of '{name}': run 'layerwise run {name} --scale {scale}' and keep its receipt.json")
    try:
        receipt = Receipt.model_validate(data)
    except ValidationError as error:
        raise BadInput(f"the {scale} receipt of '{name}' is malformed: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}") from error
    job = read_job(find(name), scale=scale)
    fresh = receipt.model_copy(deep=True)
    difference, verdict = judged(receipt.claim, receipt.scale, fresh.variants)
    problems = []
    if receipt.claim != job.claim:
        problems.append("the job's claim differs from the receipt's")
    if set(receipt.variants) != set(job.variants):
        problems.append(f"the job has variants {sorted(job.variants)}, the receipt {sorted(receipt.variants)}")
    if verdict != receipt.verdict:
        problems.append(f"the values imply '{verdict}', the receipt says '{receipt.verdict}'")
    if (difference is None) != (receipt.difference is None) or (
        difference and receipt.difference and abs(difference.mean - receipt.difference.mean) > TOLERANCE
    ):
        problems.append("the difference does not follow from the values")
    problems += [
        f"the mean of '{n}' does not follow from its values" for n, v in receipt.variants.items() if _off(v.mean, fresh.variants[n].mean)
    ]
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


def _off(a: float | None, b: float | None) -> bool:
    return (a is None) != (b is None) or (a is not None and b is not None and abs(a - b) > TOLERANCE * max(1.0, abs(b)))
