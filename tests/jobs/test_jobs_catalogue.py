"""The systems that come along: they read, they check, and their listing is what others build on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import yaml

from layerwise.errors import BadInput
from layerwise.jobs.catalogue import SYSTEMS, find, listing, names, receipt_data, receipts_folder
from layerwise.jobs.check import check_job
from layerwise.jobs.schema import STEPS_TO_SMALL, Scale, read_job
from layerwise.jobs.yamlfile import read_yaml

SYSTEM_NAMES = names()


def test_there_are_systems() -> None:
    assert {"demo", "mix-ln"} <= set(SYSTEM_NAMES)


@pytest.mark.parametrize("name", SYSTEM_NAMES)
def test_name_of_a_system_is_its_files(name: str) -> None:
    assert read_job(find(name)).name == name


@pytest.mark.parametrize("scale", get_args(Scale))
@pytest.mark.parametrize("name", SYSTEM_NAMES)
def test_system_reads_at_every_scale(name: str, scale: Scale) -> None:
    if scale in STEPS_TO_SMALL and scale not in read_yaml(find(name))["scales"]:
        with pytest.raises(BadInput, match=f"no scale '{scale}'"):
            read_job(find(name), scale=scale)
        return
    job = read_job(find(name), scale=scale)
    assert job.scale == scale
    assert not job.scales
    if job.claim is not None:
        assert {job.claim.method, job.claim.baseline} <= set(job.plans())


@pytest.mark.parametrize(
    ("name", "scale"),
    [(n, s) for n in SYSTEM_NAMES for s in ("smoke", "small", *(s for s in STEPS_TO_SMALL if s in read_yaml(find(n))["scales"]))],
)
def test_system_passes_every_check_before_it_runs(name: str, scale: Scale, data_dir: Path) -> None:
    job = read_job(find(name), scale=scale)
    assert set(check_job(job, data_dir=data_dir)) == set(job.variants)


@pytest.mark.parametrize("name", SYSTEM_NAMES)
def test_smoke_scale_needs_no_data_of_others_and_claims_nothing_by_seeds(name: str) -> None:
    job = read_job(find(name), scale="smoke")
    assert all(plan.data.source.startswith("builtin:") for plan in job.plans().values())


@pytest.mark.parametrize("name", SYSTEM_NAMES)
def test_system_says_what_it_comes_from(name: str) -> None:
    job = read_job(find(name))
    assert job.title and job.family and job.kinds
    assert (job.paper is None) == (job.card is None)
    assert job.claim is not None


def test_listing_has_the_keys_that_others_read() -> None:
    entries = listing()
    assert [e["name"] for e in entries] == SYSTEM_NAMES == sorted(p.stem for p in SYSTEMS.glob("*.yaml"))
    for entry in entries:
        assert set(entry) == {"name", "card", "title", "family", "kinds", "receipts"}
        assert isinstance(entry["kinds"], list) and isinstance(entry["title"], str)
        assert entry["receipts"].keys() >= {"small"}
        assert set(entry["receipts"].values()) <= {"holds", "fails", "inconclusive", None}
    assert json.loads(json.dumps(entries)) == entries


def test_listing_agrees_with_the_job_files() -> None:
    for entry in listing():
        job = read_job(find(entry["name"]))
        assert (entry["card"], entry["title"], entry["family"], entry["kinds"]) == (job.card, job.title, job.family, job.kinds)


def test_listing_shows_the_verdict_of_a_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "demo.json").write_text(json.dumps({"verdict": "fails"}))
    monkeypatch.setenv("LAYERWISE_RECEIPTS", str(tmp_path))
    found = {e["name"]: e["receipts"]["small"] for e in listing()}
    assert found["demo"] == "fails" and found["mix-ln"] is None


def test_receipts_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERWISE_RECEIPTS", str(tmp_path))
    assert receipts_folder() == tmp_path
    assert receipt_data("demo", "small") is None
    monkeypatch.setenv("LAYERWISE_RECEIPTS", str(tmp_path / "absent"))
    assert receipts_folder() is None and receipt_data("demo", "small") is None


def test_receipt_that_is_not_json_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "demo.json").write_text("{")
    monkeypatch.setenv("LAYERWISE_RECEIPTS", str(tmp_path))
    with pytest.raises(BadInput, match=r"demo\.json is not JSON"):
        receipt_data("demo", "small")


def test_file_is_found_by_its_path_and_a_system_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("name: mine")
    assert find("mine.yaml") == Path("mine.yaml")
    assert find("demo") == SYSTEMS / "demo.yaml"
    for wrong, told in (("dem", "'demo'"), ("yours.yaml", "no file"), ("a/demo", "no file"), ("../demo", "no file")):
        with pytest.raises(BadInput, match=told):
            find(wrong)


@pytest.mark.parametrize("name", SYSTEM_NAMES)
def test_resolved_job_reads_back_as_itself(name: str) -> None:
    # `layerwise show` prints this, and a run folder keeps it.
    job = read_job(find(name), scale="smoke")
    again = read_job(yaml.safe_load(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False)))
    assert again.plans() == job.plans()
    assert again.model_dump(mode="json") == job.model_dump(mode="json")
