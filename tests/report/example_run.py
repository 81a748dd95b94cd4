"""A small synthetic run folder that has everything a real one can have; numbers are made up but plausible."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

VARIANTS = {"mix-ln": {}, "pre-ln": {"model.stack.overrides": {}}, "post-ln": {"model.stack.layer.placement": "post"}}
SEEDS = [0, 1, 2]
DEPTH, REMOVED = 8, [5, 6]
STEPS = range(5, 205, 5)

JOB: dict[str, Any] = {
    "name": "mix-ln",
    "title": "Mix-LN: combining Pre-LN and Post-LN",
    "card": "031-mix-ln",
    "family": "normalization",
    "kinds": ["part", "edit"],
    "paper": {
        "title": "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN",
        "authors": "Li, Yin and Liu",
        "year": 2024,
        "arxiv": "2412.13795",
    },
    "claim": {
        "text": "Post-LN in the first quarter of the layers and Pre-LN in the rest trains to a lower loss than Pre-LN throughout.",
        "metric": "val_loss",
        "direction": "lower",
        "method": "mix-ln",
        "baseline": "pre-ln",
        "paper_ratio": 0.97,
    },
    "data": {"source": "builtin:cpython-docs", "context": 128},
    "model": {"stack": {"depth": DEPTH, "width": 128, "layer": {"placement": "pre"}, "overrides": {"0:2": {"placement": "post"}}}},
    "stages": {
        "pretrain": {"train": "causal-lm", "steps": 200},
        "look": {"analyze": "inspect"},
        "shrink": {"edit": "drop-layers", "count": 2},
        "heal": {"train": "causal-lm", "steps": 100},
        "quality": {"evaluate": "language-modeling"},
        "write": {"generate": ["def main(", "The module"], "new": 48},
    },
    "variants": VARIANTS,
    "seeds": SEEDS,
    "scale": "small",
    "run": {"device": "cpu", "data_dir": "/somewhere/private"},
}


def example_run(folder: Path, *, job: dict[str, Any] | None = None, events: int | None = None, receipt: bool = True) -> Path:
    """Write the run and return its folder.

    Args:
        job: changes to the job. events: write only so many events (a run that was killed). receipt: whether there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**JOB, **(job or {})}
    (folder / "job.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    lines = [json.dumps(line) + "\n" for line in journal()]
    (folder / "events.jsonl").write_text("".join(lines[:events]))
    if receipt:
        (folder / "receipt.json").write_text(json.dumps(result(whole)))
    return folder


def loss_of(variant: str, seed: int, stage: str, step: int) -> float:
    floor = {"mix-ln": 2.31, "pre-ln": 2.36, "post-ln": 2.52}[variant]
    noise = random.Random(f"{variant}{seed}{stage}{step}").gauss(0, 0.035)
    if stage == "heal":
        return floor + 0.03 + 0.5 * math.exp(-step / 18) + 0.01 * seed + noise * 0.7
    return floor + 3.1 * math.exp(-step / 38) + 0.02 * seed + noise


def metrics() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for seed in SEEDS:
        for variant in VARIANTS:
            for stage, steps in (("pretrain", STEPS), ("heal", range(5, 105, 5))):
                depth = DEPTH if stage == "pretrain" else DEPTH - len(REMOVED)
                for step in steps:
                    line = {"variant": variant, "seed": seed, "stage": stage, "step": step, "loss": loss_of(variant, seed, stage, step)}
                    line |= {
                        "lr": 1e-3 * min(step / 20, 1),
                        "grad_norm": 0.6 + 2 * math.exp(-step / 30) + 0.1 * random.Random(step + seed).random(),
                    }
                    line |= {"tokens": step * 2048, "seconds": round(step * 0.19 + 0.01 * seed, 3)}
                    if step % 20 == 0:
                        line["val_loss"] = loss_of(variant, seed, stage, step) + 0.05
                    if step % 10 == 0:
                        line |= {f"rotation/{i}": (1 - math.exp(-step / (60 + 12 * i))) * (0.4 + 0.02 * i) for i in range(depth)}
                        line |= {
                            f"grad_norm/{i}": (0.02 + 0.3 * math.exp(-i / 2.5)) * (1 + 2 * math.exp(-step / 40))
                            for i in range(-1, depth + 1)
                        }
                    lines.append(line)
    resumed = [{**line, "loss": line["loss"] + 50} for line in lines[10:14]]  # what a killed attempt had written before
    return [*lines[:10], *resumed, *lines[10:]]


def layer_table(variant: str, seed: int) -> dict[str, Any]:
    shift = 0.01 * seed + {"mix-ln": 0.02, "pre-ln": -0.02, "post-ln": 0.0}[variant]
    rows: list[list[Any]] = [["embedding", 32768, 0, None, None, 0.41 + shift]]
    for i in range(DEPTH):
        angle = 0.34 * math.exp(-i / 3) + 0.05 + shift / 4 + (0.08 if i == DEPTH - 1 else 0)
        rows.append([i, 198272, 393216, angle, 2.9 - 0.17 * i + shift, 0.05 + 0.4 * math.exp(-i / 2.4) + shift / 10])
    rows.append(["head", 256, 65536, None, None, 0.22 + shift])
    return {
        "title": "Layers",
        "columns": ["layer", "parameters", "FLOPs per token", "angular distance", "attention entropy", "gradient norm"],
        "rows": rows,
    }


def matrix(seed: int) -> dict[str, Any]:
    values = [
        [round(0.36 * math.sqrt(n) * math.exp(-i / 5) + 0.03 + 0.004 * seed, 4) if i + n <= DEPTH else None for i in range(DEPTH)]
        for n in range(1, DEPTH + 1)
    ]
    return {
        "title": "Angular distance of a block",
        "x_label": "first layer",
        "y_label": "layers",
        "x": list(range(DEPTH)),
        "y": list(range(1, DEPTH + 1)),
        "values": values,
    }


def findings(variant: str, seed: int, stage: str) -> dict[str, Any]:
    if stage == "look":
        drop = [[i, round(0.9 * math.exp(-i / 1.5) + (-0.012 if i in REMOVED else 0.05), 5)] for i in range(DEPTH)]
        return {
            "metrics": {"angular_distance_mean": 0.171 + 0.002 * seed, "params": 1619200},
            "tables": [
                layer_table(variant, seed),
                {"title": "Loss without each layer", "columns": ["layer", "change of loss"], "rows": drop},
                {
                    "title": "Block that turns the stream least",
                    "columns": ["layers dropped", "first layer", "angular distance"],
                    "rows": [[1, 6, 0.0912], [2, 5, 0.1411], [3, 4, 0.2105]],
                },
            ],
            "matrices": [matrix(seed)],
            "notes": ["Looked at 128 rows of the training split."],
        }  # fmt: skip
    if stage == "quality":
        return {
            "metrics": {"val_loss": value(variant, seed), "perplexity": math.exp(value(variant, seed)), "accuracy": 0.47 + 0.001 * seed}
        }
    if stage == "write":
        texts = {
            "def main(": "args: list[str]) -> int:\n    parser = argparse.ArgumentParser()\n",
            "The module": " defines the following functions and the\n exceptions that they raise.",
        }
        return {
            "tables": [
                {"title": "Continuations", "columns": ["prompt", "text"], "rows": [[p, t + "." * (seed + 1)] for p, t in texts.items()]}
            ]
        }
    return {"metrics": {"train_loss": value(variant, seed) - 0.04}}


def value(variant: str, seed: int) -> float:
    base = {"mix-ln": 2.352, "pre-ln": 2.401, "post-ln": 2.566}[variant]
    return base + [0.011, -0.006, 0.018][seed] + random.Random(f"{variant}{seed}").gauss(0, 0.004)


def journal() -> list[dict[str, Any]]:
    kinds = {"pretrain": ("train", "causal-lm", 38.2), "look": ("analyze", "inspect", 2.1), "shrink": ("edit", "drop-layers", 0.9)}
    kinds |= {
        "heal": ("train", "causal-lm", 15.3),
        "quality": ("evaluate", "language-modeling", 1.4),
        "write": ("generate", "generate", 0.6),
    }
    full = {"layers": DEPTH, "params": 1619200, "bytes": 6476800}
    cut = {"layers": DEPTH - len(REMOVED), "params": 1222656, "bytes": 4890624}
    events: list[dict[str, Any]] = [{"event": "run-started", "job": "mix-ln", "scale": "small"}]
    for seed in SEEDS:
        for variant in VARIANTS:
            for stage, (kind, name, seconds) in kinds.items():
                place = {"variant": variant, "seed": seed, "stage": stage, "kind": kind, "name": name}
                events.append({"event": "stage-started", **place})
                done = {"event": "stage-finished", **place, "reused": seed == 0 and variant == "pre-ln" and stage == "pretrain"}
                done |= {"seconds": seconds + 0.31 * seed, "findings": findings(variant, seed, stage)}
                if stage == "pretrain":
                    done["after"] = full
                if stage == "shrink":
                    done |= {"before": full, "after": cut, "removed": [4, 5] if (variant, seed) == ("post-ln", 2) else REMOVED}
                events.append(done)
        if seed == 0:
            events += [{"event": "run-stopped"}, {"event": "run-resumed"}]
    events.append({"event": "run-finished", "verdict": "holds"})
    return [{"time": f"2026-03-04T10:{i // 60:02d}:{i % 60:02d}.000+00:00", **event} for i, event in enumerate(events)]


def result(job: dict[str, Any]) -> dict[str, Any]:
    arms = {}
    for i, name in enumerate(VARIANTS):
        values = {str(s): value(name, s) for s in SEEDS}
        mean = sum(values.values()) / 3
        std = math.sqrt(sum((v - mean) ** 2 for v in values.values()) / 2)
        half = 4.303 * std / math.sqrt(3)
        arms[name] = {
            "values": values,
            "mean": mean,
            "std": std,
            "ci95": [mean - half, mean + half],
            "seconds": 58.5 + i,
            "params": 1222656,
            "peak_bytes": 412876800 + i,
        }
    pairs = [value("mix-ln", s) - value("pre-ln", s) for s in SEEDS]
    mean = sum(pairs) / 3
    half = 4.303 * math.sqrt(sum((p - mean) ** 2 for p in pairs) / 2) / math.sqrt(3)
    return {
        "schema": 1,
        "system": job["name"],
        "scale": job["scale"],
        "claim": job["claim"],
        "variants": arms,
        "difference": {"mean": mean, "ci95": [mean - half, mean + half], "ratio": 0.9796},
        "verdict": "holds",
        "metrics": {
            name: {
                f"quality.{m}": {str(s): findings(name, s, "quality")["metrics"][m] for s in SEEDS}
                for m in ("val_loss", "perplexity", "accuracy")
            }
            for name in VARIANTS
        },
        "relations": [
            {"x": "quality.accuracy", "y": "quality.perplexity", "above": {"quality.accuracy": 0.4705}, "points": 6, "spearman": 0.2571}
        ],
        "environment": {
            "layerwise": "0.1.0",
            "torch": "2.9.0",
            "device": "cpu",
            "threads": 2,
            "commit": "cca6bfd01234",
            "date": "2026-03-04",
        },
        "data": [{"name": "builtin:cpython-docs", "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}],
        "notes": ["The learning rate was the same for all variants."],
    }
