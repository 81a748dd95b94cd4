"""Which norms, linears, optimizers and policies go together: every pair is trained for a few steps or refused with a reason.

`python -m layerwise.jobs.composition` writes docs/composition.md; a test compares the page with what it finds itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import torch

from layerwise.data.load import Data, load_data
from layerwise.errors import BadInput
from layerwise.files import write_file
from layerwise.jobs.check import check_job
from layerwise.jobs.fill import filled
from layerwise.jobs.schema import read_job
from layerwise.models.model import build
from layerwise.models.spec import ModelSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec

Change = dict[str, Any]

AXES: dict[str, dict[str, Change]] = {
    "norms": {
        "pre": {},
        "post": {"model.stack.layer.placement": "post"},
        "sandwich": {"model.stack.layer.placement": "sandwich"},
        "deepnorm": {"model.stack.layer.placement": "deepnorm"},
        "lns": {"model.stack.layer.placement": "lns"},
        "mix-ln": {"model.stack.overrides": {"0:1": {"placement": "post"}}},
        "normformer": {"model.stack.layer.head_scale": "before", "model.stack.layer.mixer_norm": True, "model.stack.layer.ffn_norm": True},
        "gpas": {"model.stack.layer.stream_gate": "gpas"},
    },
    "linears": {
        "dense": {},
        "lora": {"model.stack.layer.linears": {"*": {"kind": "lora", "rank": 2}}},
        "low-rank": {"model.stack.layer.linears": {"*": {"kind": "low-rank", "rank": 4}}},
        "sparse-low-rank": {"model.stack.layer.linears": {"*": {"kind": "sparse-low-rank", "rank": 4}}},
        "qlora": {"model.stack.layer.linears": {"*": {"kind": "qlora", "rank": 2}}},
        "loqt": {"model.stack.layer.linears": {"*": {"kind": "loqt", "rank": 4}}},
        "binary": {"model.stack.layer.linears": {"*": {"kind": "binary"}}},
    },
    "optimizers": {
        "adamw": {},
        "sgd": {"stages.fit.optimizer": {"name": "sgd", "lr": 0.1}},
        "layca": {"stages.fit.optimizer": {"name": "layca", "lr": 0.01}},
        "gsm": {"stages.fit.optimizer": {"name": "gsm", "lr": 0.01}},
        "scale": {"stages.fit.optimizer": {"name": "scale", "lr": 1.0e-3}},
        "muon": {"stages.fit.optimizer": {"name": "muon", "lr": 1.0e-3}},
        "galore": {"stages.fit.optimizer": {"name": "galore", "lr": 1.0e-2, "options": {"rank": 2}}},
        "fira": {"stages.fit.optimizer": {"name": "fira", "lr": 1.0e-2, "options": {"rank": 2}}},
        "apollo": {"stages.fit.optimizer": {"name": "apollo", "lr": 1.0e-2, "options": {"rank": 2}}},
    },
    "policies": {
        "none": {},
        "freeze": {"stages.fit.policies": [{"name": "freeze", "layers": ["0:1"]}]},
        "layer-dropout": {"stages.fit.policies": [{"name": "layer-dropout", "rate": 0.5}]},
        "random-ltd": {"stages.fit.policies": [{"name": "random-ltd", "keep": 8}]},
        "growth": {"stages.fit.policies": [{"name": "growth", "depths": [1, 3]}]},
        "per-layer-updates": {"stages.fit.policies": [{"name": "per-layer-updates"}]},
        "loqt": {"stages.fit.policies": [{"name": "loqt", "gap": 2}]},
        "restart-adapters": {"stages.fit.policies": [{"name": "restart-adapters", "every": 2, "rewarm": 1}]},
        "keep-zeros": {"stages.fit.policies": [{"name": "keep-zeros"}]},
        "rotation": {"stages.fit.policies": [{"name": "rotation", "every": 2}]},
    },
}
"""Axis -> choice -> the change that makes it, beside the first of every other axis."""

JOB: dict[str, Any] = {
    "name": "composition",
    "data": {"source": "builtin:docs", "documents": 12, "length": 16, "tokenizer": {"kind": "bytes"}},
    "model": {"preset": "decoder", "stack": {"depth": 3, "width": 16, "layer": {"heads": 2, "ffn_width": 24}}},
    "stages": {"fit": {"train": "causal-lm", "steps": 4, "batch": 4, "clip": None}},
}


def outcome(change: Change, data: Data) -> str | None:
    """None if a job with this change trains, its loss finite and its weights moved; else why it is refused.

    Raises:
        AssertionError: it trains and the weights stay, which is neither.
    """
    try:
        plan = check_job(read_job(JOB, settings=change))["default"]
        assert isinstance(plan.model, ModelSpec) and isinstance(plan.stages[0].spec, TrainSpec)
        model = build(filled(plan.model, data), 0)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        trained = train(model, data, plan.stages[0].spec)
    except BadInput as error:
        return str(error).removeprefix("stages.fit: ")
    assert torch.isfinite(torch.tensor(trained.findings.metrics["train_loss"]))
    after = dict(model.named_parameters())
    assert any(not torch.equal(before[n], after[n]) for n in before), f"{change}: nothing moved"
    return None


def outcomes(data: Data) -> dict[tuple[str, str], dict[tuple[str, str], str | None]]:
    """(axis, axis) -> (choice, choice) -> outcome, for every pair of axes and of choices."""
    alone: dict[tuple[str, str], str | None] = {
        (a, name): outcome(change, data) for a, names in AXES.items() for name, change in names.items()
    }
    found: dict[tuple[str, str], dict[tuple[str, str], str | None]] = {}
    for a, b in itertools.combinations(AXES, 2):
        table = found[a, b] = {}
        for (x, left), (y, right) in itertools.product(AXES[a].items(), AXES[b].items()):
            single = alone[a, x] if not right else alone[b, y] if not left else None
            table[x, y] = single if not (left and right) else outcome({**left, **right}, data)
    return found


def page(found: dict[tuple[str, str], dict[tuple[str, str], str | None]]) -> str:
    """The text of docs/composition.md."""
    lines = [
        "# What goes together",
        "",
        "Generated by `python -m layerwise.jobs.composition`; do not edit. Every pair is a job that was checked and trained for four steps "
        "(the other two axes at their first choice): `+` trains, a number is the reason why it is refused. "
        "`tests/jobs/test_composition.py` finds the same again.",
        "",
    ]
    reasons: list[str] = []
    for (a, b), table in found.items():
        columns = list(AXES[b])
        lines += [f"## {a.capitalize()} and {b}", "", f"| {a} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for x in AXES[a]:
            cells = []
            for y in columns:
                reason = table[x, y]
                if reason is not None and reason not in reasons:
                    reasons.append(reason)
                cells.append("+" if reason is None else f"[{reasons.index(reason) + 1}](#why-not)")
            lines.append(f"| {x} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Why not", "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1)), ""]
    return "\n".join(lines)


def small_data(root: Path | None = None) -> Data:
    """The rows that the pairs are trained on."""
    from layerwise.data.spec import DataSpec, TokenizerSpec

    raw = JOB["data"]
    spec = DataSpec(
        source=raw["source"], documents=raw["documents"], length=raw["length"], tokenizer=TokenizerSpec(raw["tokenizer"]["kind"])
    )
    return load_data(dataclasses.replace(spec), None, root)


def main() -> int:
    """Write the page."""
    write_file(Path(__file__).resolve().parents[3] / "docs" / "composition.md", page(outcomes(small_data())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
