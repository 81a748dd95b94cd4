"""Results of stages by what they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerwise.errors import BadInput
from layerwise.jobs.cache import Result, StageCache, cache_folder, code_version
from layerwise.jobs.console import Progression
from layerwise.jobs.journal import read_lines
from layerwise.jobs.run import resume_run, run_job
from layerwise.jobs.schema import read_job

KEY = "a" * 64


def kept(cache: StageCache, key: str = KEY, text: str = "weights") -> Result:
    result = Result(findings={"metrics": {"val_loss": 1.5}}, seconds=2.0, removed=[1], curve=[{"step": 1, "loss": 3.0}])
    with cache.keep(key, result) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "model.safetensors").write_text(text)
    return result


def test_result_comes_back_as_it_was(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    result = kept(cache)
    assert cache.find(KEY) == result
    assert result.model is not None and (result.model / "model.safetensors").read_text() == "weights"
    assert cache.find("b" * 64) is None


def test_result_without_a_model_has_none(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    with cache.keep(KEY, Result(seconds=1.0)):
        pass
    found = cache.find(KEY)
    assert found is not None and found.model is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "result.json").write_text("{"),
        lambda f: (f / "result.json").unlink(),
        lambda f: (f / "checksums.json").unlink(),
        lambda f: (f / "checksums.json").write_text("[]"),
        lambda f: (f / "checksums.json").write_text("not JSON"),
        lambda f: (f / "model" / "model.safetensors").write_text("weight"),
        lambda f: (f / "model" / "model.safetensors").write_text("Weights"),
        lambda f: (f / "model" / "model.safetensors").unlink(),
    ],
    ids=["cut result", "no result", "no sums", "sums of another kind", "sums cut", "model cut", "model altered", "no model"],
)
def test_broken_result_is_as_good_as_absent_and_is_replaced(tmp_path: Path, damage: Any) -> None:
    cache = StageCache(tmp_path)
    kept(cache)
    damage(cache.root / KEY)
    assert cache.find(KEY) is None
    again = kept(cache, text="other weights")
    assert cache.find(KEY) == again
    assert [p.name for p in cache.root.iterdir()] == [KEY]


def test_result_of_another_version_is_as_good_as_absent(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    kept(cache)
    folder = cache.root / KEY
    from layerwise.files import sha256

    (folder / "result.json").write_text(json.dumps({"findings": {}, "loss": 1.0}))
    sums = json.loads((folder / "checksums.json").read_text())
    (folder / "checksums.json").write_text(json.dumps({**sums, "result.json": sha256(folder / "result.json")}))
    assert cache.find(KEY) is None


def test_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    with pytest.raises(KeyboardInterrupt), cache.keep(KEY, Result()) as folder:
        (folder / "model").mkdir()
        raise KeyboardInterrupt
    assert cache.find(KEY) is None
    assert not list(cache.root.iterdir())


def test_stage_that_fails_leaves_the_older_result(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    result = kept(cache)
    with pytest.raises(ZeroDivisionError), cache.keep(KEY, Result()):
        _ = 1 / 0
    assert cache.find(KEY) == result


def test_folder_of_a_crash_halfway_is_not_a_result(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    (cache.root / KEY / "model").mkdir(parents=True)
    assert cache.find(KEY) is None


def test_where_results_are_kept_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("LAYERWISE_CACHE", "off")
    assert cache_folder() is None
    monkeypatch.delenv("LAYERWISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "layerwise"


def test_code_version_is_a_digest_that_stays() -> None:
    assert len(code_version()) == 64 and code_version() == code_version()


# What decides whether a stage is run again: seen on a job of one cheap stage that changes nothing.
JOB: dict[str, Any] = {
    "name": "tiny",
    "data": {"length": 16, "tokenizer": {"kind": "bytes"}},
    "model": {"preset": "decoder", "stack": {"depth": 2, "width": 8, "layer": {"heads": 2}}},
    "stages": {
        "measure": {"evaluate": "language-modeling", "batches_at_most": 1},
        "cut": {"edit": "drop-layers", "layers": [0]},
        "after": {"evaluate": "language-modeling", "batches_at_most": 1},
    },
}


@pytest.fixture
def reused(verses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the job with changes (dotted paths) and tells which of its stages were taken from the cache."""
    monkeypatch.setenv("LAYERWISE_CACHE", str(tmp_path / "cache"))
    count = iter(range(100))

    def run(changes: dict[str, Any] | None = None) -> list[bool]:
        out = tmp_path / f"run-{next(count)}"
        job = read_job({**JOB, "data": {**JOB["data"], "source": f"path:{verses}"}}, settings=changes)
        run_job(job, out, progression=Progression(quiet=True))
        return [line["reused"] for line in read_lines(out / "events.jsonl") if line["event"] == "stage-finished"]

    run()
    return run


def test_same_job_is_not_computed_twice(reused: Any) -> None:
    assert reused() == [True, True, True]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seeds": [1]}, [False, False, False]),
        ({"data.length": 24}, [False, False, False]),
        ({"data.seed": 7}, [False, False, False]),
        ({"model.stack.layer.placement": "post"}, [False, False, False]),
        ({"stages.measure.batches_at_most": 2}, [False, True, True]),
        ({"stages.cut.layers": [1]}, [True, False, False]),
        ({"stages.after.split": "train"}, [True, True, False]),
        ({"title": "another", "name": "other", "notes": ["n"]}, [True, True, True]),
    ],
    ids=["seed", "length", "split", "model", "first stage", "edit", "last stage", "words"],
)
def test_stage_is_computed_anew_when_something_it_came_from_changed(reused: Any, changes: dict[str, Any], expected: list[bool]) -> None:
    assert reused(changes) == expected


def test_changed_text_is_seen(reused: Any, verses: Path, tmp_path: Path) -> None:
    assert reused() == [True, True, True]
    other = tmp_path / "other"
    other.mkdir()
    for path in verses.iterdir():
        (other / path.name).write_text(path.read_text().replace("Verse", "Worse"))
    assert reused({"data.source": f"path:{other}"}) == [False, False, False]


def test_two_variants_share_what_they_have_in_common(reused: Any) -> None:
    # Six stages in all; the first variant is the job itself, the second differs from the cut on.
    assert reused({"variants": {"a": {}, "b": {"stages.cut.layers": [1]}}}) == [True, True, True, True, False, False]


def test_damaged_result_is_computed_again_with_the_same_outcome(reused: Any, tmp_path: Path) -> None:
    results = sorted((tmp_path / "cache" / "stages").glob("*/result.json"))
    assert len(results) == 3
    for path in results:
        path.write_text("")
    assert reused() == [False, False, False]
    first, second = (json.loads((tmp_path / f"run-{i}" / "receipt.json").read_text())["metrics"] for i in (0, 1))
    assert first == second


def test_run_without_a_cache_keeps_results_in_its_own_folder(verses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_CACHE", "off")
    job = read_job({**JOB, "data": {**JOB["data"], "source": f"path:{verses}"}})
    first = run_job(job, tmp_path / "run", progression=Progression(quiet=True))
    again = resume_run(tmp_path / "run", progression=Progression(quiet=True))
    assert first.metrics == again.metrics
    done = [line["reused"] for line in read_lines(tmp_path / "run" / "events.jsonl") if line["event"] == "stage-finished"]
    assert done == [False, False, False, True, True, True]


def test_resuming_with_an_edited_job_file_checks_it_again(verses: Path, tmp_path: Path) -> None:
    job = read_job({**JOB, "data": {**JOB["data"], "source": f"path:{verses}"}})
    run_job(job, tmp_path / "run", progression=Progression(quiet=True))
    file = tmp_path / "run" / "job.yaml"
    edited = yaml.safe_load(file.read_text())
    edited["stages"]["cut"]["layers"] = [5]
    file.write_text(yaml.safe_dump(edited))
    with pytest.raises(BadInput, match="cannot drop layer 5"):
        resume_run(tmp_path / "run", progression=Progression(quiet=True))
