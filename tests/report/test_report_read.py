"""Reading run folders: whole, unfinished, failed, torn, resumed."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path

import pytest
from example_run import DEPTH, JOB, REMOVED, SEEDS, STEPS, VARIANTS, example_run, journal

from layerwise.errors import BadInput
from layerwise.report import write_report
from layerwise.report.curves import POINTS, curves
from layerwise.report.history import depths, histories
from layerwise.report.read import Run, read_run
from layerwise.report.result import measured, rows


def test_whole_run(run_folder: Path) -> None:
    run = read_run(run_folder)
    assert run.name == "mix-ln" and run.state == "finished" and run.problems == []
    assert run.variants == list(VARIANTS) and run.seeds == ["0", "1", "2"] and run.stage_names == list(JOB["stages"])
    assert len(run.stages) == run.planned() == len(VARIANTS) * len(SEEDS) * len(JOB["stages"])
    assert run.elapsed == pytest.approx(len(journal()) - 1)
    assert "private" not in run.job_text and "cpython-docs" in run.job_text


def test_of_lines_written_twice_the_last_counts(run_folder: Path) -> None:
    lines = [line for line in read_run(run_folder).lines if (line["variant"], line["seed"], line["stage"]) == ("mix-ln", "0", "pretrain")]
    assert sorted(line["step"] for line in lines) == list(STEPS)
    assert max(line["loss"] for line in lines) < 10  # the first attempt's losses were 50 higher


def test_torn_last_line_is_normal_and_a_broken_one_is_told(tmp_path: Path) -> None:
    folder = example_run(tmp_path / "run")
    whole = len(read_run(folder).stages)
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "stage-fin')
    assert len(read_run(folder).stages) == whole and read_run(folder).problems == []
    text = (folder / "metrics.jsonl").read_text().splitlines()
    text[3] = text[3][:20]
    text[5] = text[5].replace('"loss": ', '"loss": NaN, "was": ')
    (folder / "metrics.jsonl").write_text("\n".join(text))
    run = read_run(folder)
    assert run.problems == ["metrics.jsonl: 1 line could not be read (first: line 4)."]
    assert sum(line.get("loss") is None for line in run.lines) == 1


@pytest.mark.parametrize("missing", ["job.yaml", "events.jsonl", "metrics.jsonl", "receipt.json"])
def test_any_file_may_be_missing(tmp_path: Path, missing: str) -> None:
    folder = example_run(tmp_path / "run")
    (folder / missing).unlink()
    assert write_report(folder).read_text(encoding="utf-8").count("<h1>") == 1


@pytest.mark.parametrize("damaged", ["job.yaml", "receipt.json"])
def test_a_damaged_file_is_told(tmp_path: Path, damaged: str) -> None:
    folder = example_run(tmp_path / "run")
    (folder / damaged).write_text("{ [")
    run = read_run(folder)
    assert [damaged in problem for problem in run.problems] == [True]
    assert run.problems[0] in html.unescape(write_report(folder).read_text(encoding="utf-8"))


def test_no_run() -> None:
    with pytest.raises(BadInput, match="no folder"):
        read_run(Path("nowhere"))


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failed_run_says_where_and_why(tmp_path: Path) -> None:
    folder = example_run(tmp_path / "run", events=30, receipt=False)  # the 30th tells of a stage that started
    with (folder / "events.jsonl").open("a") as file:
        file.write(
            json.dumps({"time": "2026-03-04T11:00:00+00:00", "event": "stage-failed", "message": "Diverged: the loss is not finite"}) + "\n"
        )
    run = read_run(folder)
    assert run.state == "failed" and run.message == "post-ln, seed 0, stage shrink: Diverged: the loss is not finite"
    page = write_report(folder).read_text(encoding="utf-8")
    assert run.message in page and "No verdict yet" in page and "of 54 stages are done" in page


def test_states() -> None:
    from layerwise.report.read import _state

    start, stop, again = {"event": "run-started"}, {"event": "run-stopped"}, {"event": "run-resumed"}
    assert [_state(e)[0] for e in ([start], [start, stop], [start, stop, again], [start, {"event": "run-finished"}])] == [
        "unfinished", "stopped", "unfinished", "finished",
    ]  # fmt: skip


def test_unfinished_run_shows_values_so_far(tmp_path: Path) -> None:
    run = read_run(example_run(tmp_path / "run", events=1 + 2 * 6, receipt=False))  # one seed of one variant
    values = measured(run)
    assert list(values["val_loss"]) == ["mix-ln"] and next(iter(values)) == "val_loss"
    (row,) = [row for row in rows(run, values) if row.mean is not None]
    assert row.variant == "mix-ln" and row.ci95 is None and row.std is None and row.values == 1


def test_planned_stages_follow_what_variants_change() -> None:
    job = {
        "stages": {"a": {}, "b": {}},
        "variants": {"x": {}, "y": {"stages.b": None}, "z": {"stages.c": {"train": "mlm"}, "stages.a.steps": 3}},
        "seeds": [0, 1],
    }
    assert Run("", job).planned() == 2 * (2 + 1 + 3)


def test_history_groups_seeds_and_keeps_the_first_numbers(run_folder: Path) -> None:
    found = {(h.variant, *h.seeds): h.moments for h in histories(read_run(run_folder))}
    assert set(found) == {("mix-ln", "0", "1", "2"), ("pre-ln", "0", "1", "2"), ("post-ln", "0", "1"), ("post-ln", "2")}
    start, shrink = found["mix-ln", "0", "1", "2"]
    assert [c.label for c in start.cells] == [str(i) for i in range(DEPTH)] and shrink.removed == [str(i) for i in REMOVED]
    assert shrink.counts() == ["8 → 6 layers", "1,619,200 → 1,222,656 parameters, −24.5 %", "6.48 MB → 4.89 MB, −24.5 %"]


def test_second_cut_names_layers_by_their_first_number() -> None:
    from layerwise.report.read import Finished

    def cut(name: str, layers: int, removed: list[int]) -> Finished:
        return Finished(
            "v", "0", name, "edit", "drop-layers", before={"layers": layers}, after={"layers": layers - len(removed)}, removed=removed
        )

    run = Run("", stages=[cut("one", 6, [1, 2]), cut("two", 4, [1])])
    assert [m.removed for m in histories(run)[0].moments] == [[], ["1", "2"], ["3"]]
    grown = Finished("v", "0", "grow", "edit", "grow", before={"layers": 3}, after={"layers": 5})
    assert [c.label for c in histories(Run("", stages=[*run.stages, grown]))[0].moments[-1].cells] == ["0", "1", "2", "3", "4"]
    assert not histories(Run("", stages=[*run.stages, grown]))[0].moments[-1].known


def test_depth_of_every_stage(run_folder: Path) -> None:
    known = depths(read_run(run_folder))
    assert [known["mix-ln", "1", stage] for stage in JOB["stages"]] == [8, 8, 6, 6, 6, 6]


def test_curves_keep_all_seeds_on_the_same_steps() -> None:
    lines = [
        {"variant": "v", "seed": s, "stage": "t", "step": i, "loss": float(i), **({"val": 1.0} if i % 700 == 0 else {})}
        for s in ("0", "1")
        for i in range(1, 7001 - 1000 * int(s))
    ]
    blocks = curves(Run("", lines=lines))
    by_key = {(b["seed"], key): b for b in blocks for key in b["values"]}
    first, second = by_key["0", "loss"]["step"], by_key["1", "loss"]["step"]
    assert len(first) <= POINTS + 1 and first[-1] == 7000 and second[-1] == 6000
    assert set(second) - {6000} <= set(first)
    assert by_key["0", "val"]["step"] == [700 * i for i in range(1, 11)]  # rare values are not thinned away
    assert by_key["0", "loss"]["values"]["loss"] == [float(i) for i in first]


def test_room_imports_no_torch() -> None:
    code = "import sys, layerwise.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
