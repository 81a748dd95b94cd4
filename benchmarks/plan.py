"""What `layerwise plan` finds for the small language model of the compression systems, over several seeds, beside every single method.

    python benchmarks/plan.py [--sizes 0.5,0.2,0.14] [--seeds 0,1,2] [--out DIR]     # writes receipts/plan.json

A seed trains a model (the block that qep, rsq and layerwise-bits share), stores it in bfloat16 as a Hugging Face checkpoint, draws the rows
that are calibrated on, and is planned for by itself. Differences are paired by seed; the verdict is computed as in every receipt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from layerwise.files import write_json
from layerwise.jobs.catalogue import find
from layerwise.jobs.inspection import convert_checkpoint
from layerwise.jobs.planning import plan_data, plan_model
from layerwise.jobs.run import run_job
from layerwise.jobs.schema import read_job
from layerwise.jobs.statistics import mean_interval, verdict
from layerwise.plan.choice import How
from layerwise.plan.trials import COMBINED, UNIFORM

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="0.5,0.2,0.14")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tries", type=int, default=6)
    parser.add_argument("--base", type=Path, default=None, help="run that trained the models already")
    parser.add_argument("--out", type=Path, default=None, help="where models and plans stay")
    given = parser.parse_args()
    seeds, sizes = [int(s) for s in given.seeds.split(",")], [float(s) for s in given.sizes.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        qep = read_job(find("qep")).model_dump(mode="json")
        job = {
            "name": "base",
            "data": qep["data"],
            "model": qep["model"],
            "stages": {"pretrain": qep["stages"]["pretrain"]},
            "seeds": seeds,
        }
        base = given.base or folder / "base"
        if given.base is None:
            run_job(read_job(job), base)
        plans = {}
        for seed in seeds:
            model = convert_checkpoint(base / "models" / "default" / f"seed-{seed}", folder / f"model-{seed}", dtype="bfloat16")
            found = plan_model(
                str(model), targets=sizes, out=folder / f"plan-{seed}", text=qep["data"]["source"], length=qep["data"]["length"],
                rows=given.rows, tries=given.tries, how=How(samples=given.samples), seed=seed, say=print,
            )  # fmt: skip
            plans[str(seed)] = plan_data(found)
    write_json(ROOT / "receipts" / "plan.json", receipt(plans))
    print(json.dumps(receipt(plans)["targets"], indent=1))


def receipt(plans: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Held-out losses by target, method and seed, and what they say."""
    first = next(iter(plans.values()))
    targets = []
    for k, target in enumerate(first["targets"]):
        each = {seed: plan["targets"][k] for seed, plan in plans.items()}
        methods = {
            name: {
                seed: {x: t["methods"][name][x] for x in ("held_out", "loss", "bytes")} for seed, t in each.items() if t["methods"][name]
            }
            for name in target["methods"]
        }
        chosen = {
            seed: {"held_out": t["plan"]["held_out"], "bytes": t["plan"]["bytes"], "families": t["plan"]["families"]}
            for seed, t in each.items()
        }
        targets.append({"target": target["target"], "plan": chosen, "methods": methods, **judged(chosen, methods)})
    return {
        "schema": 1,
        "model": "the base model of qep.yaml, in bfloat16",
        "bytes": first["bytes"],
        "as_it_is": {seed: plan["held_out"] for seed, plan in plans.items()},
        "how": first["how"],
        "notes": first["notes"],
        "targets": targets,
        "spearman": {seed: plan["prediction"]["spearman"] for seed, plan in plans.items()},
        "environment": first["environment"],
        "data": first["data"],
    }


def judged(chosen: dict[str, Any], methods: dict[str, Any]) -> dict[str, Any]:
    """The plan minus the best single method (by the rows that plans are chosen by), paired by seed, and the verdict on "it is lower"."""
    differences: dict[str, float] = {}
    rivals: dict[str, str] = {}
    for seed, plan in chosen.items():
        single = {n: of[seed] for n, of in methods.items() if n not in (COMBINED, UNIFORM) and seed in of}
        if single:
            rivals[seed] = min(single, key=lambda n: single[n]["loss"])
            differences[seed] = plan["held_out"] - single[rivals[seed]]["held_out"]
    values = list(differences.values())
    mean, interval = mean_interval(values) if values else (None, None)
    return {"rival": rivals, "difference": {"values": differences, "mean": mean, "ci95": interval}, "verdict": verdict(values, "lower")}


if __name__ == "__main__":
    main()
