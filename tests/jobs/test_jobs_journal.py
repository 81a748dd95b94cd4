"""The files of a run that are appended to as things happen."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from layerwise.errors import BadInput
from layerwise.jobs.journal import Journal, claimed, read_lines


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.event("run-started", job="tiny")
    journal.event("run-finished", verdict=None)
    lines = list(read_lines(tmp_path / "events.jsonl"))
    assert [line["event"] for line in lines] == ["run-started", "run-finished"]
    assert lines[0]["job"] == "tiny" and lines[0]["time"] <= lines[1]["time"]


@pytest.mark.parametrize("torn", ['{"event": "half', '{"event"', "", "\n\n", "null\n", "[1]\n", "\x00\x00\x00"])
def test_line_torn_by_a_crash_is_passed_over_and_loses_no_other(tmp_path: Path, torn: str) -> None:
    Journal(tmp_path).event("before")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(torn)
    Journal(tmp_path).event("after")
    assert [line["event"] for line in read_lines(tmp_path / "events.jsonl")] == ["before", "after"]


def test_line_torn_inside_a_character_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "one"}\n{"event": "\xc3')
    Journal(tmp_path).event("two")
    assert [line["event"] for line in read_lines(tmp_path / "events.jsonl")] == ["one", "two"]


def test_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "events.jsonl")) == []


def test_steps_written_twice_count_once_and_the_later_line_wins(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step, loss in ((1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (3, 3.5), (4, 2.0)):
        journal.metrics("a", 0, "fit", {"step": step, "loss": loss})
    assert journal.curve("a", 0, "fit") == [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.5},
        {"step": 3, "loss": 3.5},
        {"step": 4, "loss": 2.0},
    ]


def test_curve_is_of_one_variant_seed_and_stage(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for variant, seed, stage in (("a", 0, "fit"), ("b", 0, "fit"), ("a", 1, "fit"), ("a", 0, "heal")):
        journal.metrics(variant, seed, stage, {"step": 1, "loss": float(len(variant) + seed)})
    assert journal.curve("a", 1, "fit") == [{"step": 1, "loss": 2.0}]
    assert journal.curve("c", 0, "fit") == []


def test_what_is_not_finite_is_left_out_so_that_every_line_is_json(tmp_path: Path) -> None:
    Journal(tmp_path).metrics("a", 0, "fit", {"step": 1, "loss": math.nan, "norm": math.inf, "lr": 0.1})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"variant": "a", "seed": 0, "stage": "fit", "step": 1, "lr": 0.1}


CLAIM = "import sys; from pathlib import Path; from layerwise.jobs.journal import claimed\n"


def test_second_process_is_kept_out_and_let_in_afterwards(tmp_path: Path) -> None:
    program = CLAIM + "with claimed(Path(sys.argv[1])): print('in')"
    with claimed(tmp_path):
        kept_out = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert "another process is working in" in kept_out.stderr and "in" not in kept_out.stdout.split()
    with claimed(tmp_path):
        pass


def test_second_claim_in_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with claimed(tmp_path), pytest.raises(BadInput, match="another process"), claimed(tmp_path):
        pass


def test_claim_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    program = CLAIM + "import os\nwith claimed(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, timeout=60)
    assert killed.returncode == -9 and (tmp_path / ".lock").exists()
    with claimed(tmp_path):
        pass


def test_claim_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), claimed(tmp_path):
        _ = 1 / 0
    with claimed(tmp_path):
        pass
