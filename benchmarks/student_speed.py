"""DistilHuBERT's student beside its teacher: parameters, operations and processor seconds of a forward pass, on one thread.

    python benchmarks/student_speed.py [--scale small|full] [--seconds 2] [--rows 1] [--repeats 9]

Teacher and student take turns, and the median of the ratios of their turns counts. Weights are untrained: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import layerwise as lw
from layerwise.analyze.cost import Operations
from layerwise.jobs.catalogue import find
from layerwise.jobs.schema import read_job
from layerwise.models.model import Model, build
from layerwise.models.spec import ModelSpec

RATES = {"small": 8_000, "full": 16_000}
"""Samples a second of the recordings that a scale reads."""


def pair(scale: str) -> tuple[Model, Model]:
    """The teacher of a scale, and the student that its job cuts out of it."""
    plan = read_job(find("distilhubert"), scale=scale).plans()["distilhubert"]
    assert isinstance(plan.model, ModelSpec)
    stages = {stage.name: stage.options for stage in plan.stages}
    teacher = build(plan.model, seed=0)
    student = lw.edit.wave_front(lw.edit.drop_layers(teacher, **stages["cut"]), **stages["front"])
    return teacher.eval(), student.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=tuple(RATES), default="small")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each recording")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = pair(args.scale)
    batch = {"input_values": torch.randn(args.rows, int(args.seconds * RATES[args.scale]), generator=torch.Generator().manual_seed(0))}
    counted, turns = [], []
    with torch.no_grad():
        for model in models:
            with Operations() as counter:
                model(batch)
            counted.append(counter.total)
        for _ in range(args.repeats):
            spent = []
            for model in models:
                begin = time.process_time()
                model(batch)
                spent.append(time.process_time() - begin)
            turns.append(spent[0] / spent[1])
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    print(f"parameters   {sizes[0]:,} and {sizes[1]:,}: {sizes[1] / sizes[0]:.3f}")
    print(f"operations   {counted[0]:,} and {counted[1]:,}: {counted[0] / counted[1]:.2f} times fewer")
    print(f"speedup      {statistics.median(turns):.2f} (median of {args.repeats} turns, {min(turns):.2f} to {max(turns):.2f})")


if __name__ == "__main__":
    main()
