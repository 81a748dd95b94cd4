"""Absurd sizes are refused with their number before any memory is taken: in this process, and in one that may not take much."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.errors import BadInput
from layerwise.models.load import load_any
from layerwise.models.model import make_model
from layerwise.models.presets import PRESETS, preset
from layerwise.models.room import closed, parameters_of
from layerwise.models.spec import model_spec

WORST = Path(__file__).with_name("worst_files.py")
JOB: dict[str, Any] = {
    "name": "large",
    "data": {"length": 32, "tokenizer": {"kind": "bytes"}},
    "model": {"preset": "decoder", "stack": {"depth": 2, "width": 16, "layer": {"heads": 2}}},
    "stages": {"fit": {"train": "causal-lm", "steps": 1, "batch": 4}},
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_counted_as_the_model_has_them(name: str) -> None:
    import torch

    spec = closed(model_spec(preset(name)))
    with torch.device("meta"):
        model = make_model(spec)
    assert parameters_of(spec) == sum(t.numel() for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.stack.width=1000000000", r"model: no model of these sizes can be built: .*1000000000"),
        ("model.stack.width=100000000", r"model: a model of [\d,]+ parameters would take [\d.e+]+ GB; this machine has [\d,.]+ GB"),
        ("model.stack.width=1000000000000", "no model of these sizes can be built"),
        ("model.stack.layer.ffn_width=100000000000", "would take"),
        ("model.embedding.vocab=1000000000000", "would take"),
        ("stages.fit.batch=1000000000000", r"stages\.fit: a batch of 1,000,000,000,000 rows of 32 tokens would take"),
        ("data.length=1000000000000", r"a batch of 4 rows of 1,000,000,000,000 tokens would take"),
        ("stages.wide={edit: lora, rank: 100000000000}", r"stages\.wide: a model of"),
    ],
)  # fmt: skip
def test_a_job_of_absurd_size_is_refused_and_nothing_is_written(verses: Path, tmp_path: Path, setting: str, message: str) -> None:
    job = copy.deepcopy(JOB)
    job["data"]["source"] = f"path:{verses}"
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    result = CliRunner().invoke(app, ["run", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run"), "--quiet", "--set", setting])
    assert result.exit_code == 2 and re.search(message, " ".join(result.stderr.split())), result.output
    assert [p.name for p in tmp_path.iterdir()] == ["job.yaml"]


def test_a_preset_of_absurd_size_is_refused() -> None:
    with pytest.raises(BadInput, match=r"a model of [\d,]+ parameters would take"):
        load_any("decoder", stack={"width": 10**6}, embedding={"vocab": 1000})


def test_the_worst_files_take_little_memory(tmp_path: Path) -> None:
    """`worst_files.py` in a process whose address space may grow by 1.5 GB."""
    done = subprocess.run([sys.executable, str(WORST), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("refused: ") >= 15, done.stdout
