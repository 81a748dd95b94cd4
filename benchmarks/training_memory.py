"""The most memory that training takes, each way of training in a process of its own, beside what the ledger counts.

    python benchmarks/training_memory.py [--only GROUP] [--write]      # --write keeps the result in receipts/training-memory.json

`weights`: a decoder on so few tokens that parameters, gradients and optimizer state are nearly all there is. `depth`: dense layers on so many
rows that activations are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from layerwise.files import write_json
from layerwise.jobs.meter import metered
from layerwise.models.model import Model, build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.optim.spec import OptimizerSpec, ScheduleSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec

ROOT = Path(__file__).resolve().parents[1]
VOCAB, LENGTH, PIXELS, CLASSES = 4096, 64, 1024, 10
INSIDE = {"name": "per-layer-updates"}
DECODER = {"model": {"stack": {"depth": 8, "width": 640, "layer": {"heads": 10, "ffn_width": 1728}}}, "batch": 2, "objective": "causal-lm"}
DENSE = {"batch": 8192, "optimizer": {"name": "sgd", "lr": 1e-3}}
SPARSE = {"*": {"kind": "sparse-low-rank", "rank": 128, "density": 0.03}}


def _decoder(
    linears: dict[str, Any] | None = None, inside: bool = False, policies: tuple[dict[str, Any], ...] = (), **optimizer: Any
) -> dict[str, Any]:
    layer = {**DECODER["model"]["stack"]["layer"], **({"linears": linears} if linears else {})}
    model = {"stack": {**DECODER["model"]["stack"], "layer": layer}}
    return {**DECODER, "model": model, "optimizer": {"lr": 1e-3, **optimizer}, "policies": (*policies, *((INSIDE,) if inside else ()))}


def _dense(depth: int, objective: str) -> dict[str, Any]:
    layer = {"kind": "dense", "channels": PIXELS, "norm": "none", "bias": True}
    return {
        **DENSE,
        "model": {"stack": {"inputs": PIXELS, "layers": [layer] * depth}, "head": {"classes": CLASSES}},
        "objective": objective,
        "policies": (),
    }


GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "weights": {
        "adamw": _decoder(name="adamw"),
        "adamw, updates inside": _decoder(name="adamw", inside=True),
        "scale": _decoder(name="scale"),
        "scale, updates inside": _decoder(name="scale", inside=True),
        "galore": _decoder(name="galore", options={"rank": 160, "gap": 50}),
        "galore, updates inside": _decoder(name="galore", options={"rank": 160, "gap": 50}, inside=True),
        "sltrain": _decoder(SPARSE, name="adamw"),
        "sltrain, updates inside": _decoder(SPARSE, name="adamw", inside=True),
        "loqt": _decoder({"*": {"kind": "loqt", "rank": 160}}, policies=({"name": "loqt", "gap": 50},), name="adamw"),
    },
    "depth": {f"{name}, {depth} layers": _dense(depth, name) for name in ("classification", "mono-forward") for depth in (4, 8, 16)},
}
"""How each is trained; all in float32, two steps."""


class Rows:
    """Random rows of text, or of pixels with a class."""

    tokens_per_row = LENGTH

    def __init__(self, batch: int, text: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        self.columns = (
            {"input_ids": torch.randint(10, VOCAB, (batch, LENGTH), generator=draw)}
            if text
            else {
                "pixel_values": torch.rand(batch, 1, 32, 32, generator=draw),
                "labels": torch.randint(0, CLASSES, (batch,), generator=draw),
            }
        )

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def batch(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def _model(way: dict[str, Any]) -> Model:
    text = way["objective"] == "causal-lm"
    described = preset("decoder" if text else "mlp", way["model"])
    described["embedding"] = {**described.get("embedding", {}), **({"vocab": VOCAB} if text else {"size": [32, 32], "channels": 1})}
    return build(model_spec(described))


ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Freed memory goes back at once. Else glibc keeps tensors' memory in a heap whose holes count as the process's."""


def measure(way: dict[str, Any]) -> dict[str, float]:
    """In this process: `peak_bytes` above what was there before the model, and what the ledger counts of one step."""
    rows = Rows(way["batch"], way["objective"] == "causal-lm")
    data = SimpleNamespace(train=rows, validation=rows, vocab=VOCAB, pad_id=0, eos_id=1, mask_id=3, classes=CLASSES)

    def steps(model: Model, policies: tuple[dict[str, Any], ...], count: int) -> dict[str, float]:
        spec = TrainSpec(
            way["objective"], steps=count, batch=way["batch"], optimizer=OptimizerSpec(**way["optimizer"]),
            schedule=ScheduleSpec("constant", warmup=0), clip=None, divergence=None, policies=policies,
        )  # fmt: skip
        return train(model, data, spec).findings.metrics

    with metered(torch.device("cpu")) as before:
        pass
    with metered(torch.device("cpu")) as meter:
        steps(_model(way), way["policies"], 2)
    counted = steps(_model(way), (*way["policies"], {"name": "ledger"}), 1)
    return {"peak_bytes": meter.peak_bytes - before.peak_bytes, **{k: v for k, v in counted.items() if k.endswith("_bytes")}}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(GROUPS))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        print(json.dumps(measure(GROUPS[given.here[0]][given.here[1]])))
        return
    results: dict[str, dict[str, dict[str, float]]] = {}
    for group, ways in GROUPS.items():
        if given.only in (None, group):
            print(
                f"\n{group:28}"
                + "".join(f"{name:>12}" for name in ("peak MB", "counted MB", "parameters", "gradients", "optimizer", "activations"))
            )
            results[group] = {}
            for name in ways:
                done = subprocess.run(
                    [sys.executable, __file__, "--here", group, name],
                    capture_output=True,
                    text=True,
                    check=False,
                    env={**os.environ, **ALLOCATOR},
                )
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-800:]}")
                found = results[group][name] = json.loads(done.stdout.splitlines()[-1])
                columns = [found["peak_bytes"], found["state_bytes"] + found["activation_bytes"]]
                columns += [found[f"{part}_bytes"] for part in ("param", "grad", "optimizer", "activation")]
                print(f"{name:28}" + "".join(f"{value / 1e6:12,.1f}" for value in columns))
    if given.write:
        write_json(ROOT / "receipts" / "training-memory.json", {"torch": torch.__version__, **results})


if __name__ == "__main__":
    main()
