"""Job files, tensors and tokenizers from strangers: one message, never another error, never a file outside the run folder.

`LAYERWISE_FUZZ=3000` makes every search that long; the usual tests take a few seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from typer.testing import CliRunner

from layerwise.cli import app
from layerwise.data.load import load_data
from layerwise.data.spec import AugmentSpec, DataSpec
from layerwise.data.tokenizer import encoded, read_tokenizer, special_ids
from layerwise.errors import BadInput
from layerwise.jobs.check import check_job
from layerwise.jobs.merge import setting
from layerwise.jobs.schema import read_job
from layerwise.models.spec import model_spec
from layerwise.safetensor import load_tensors, tensor_names

fuzz = settings(
    max_examples=int(os.environ.get("LAYERWISE_FUZZ", "60")),
    deadline=None,
    derandomize="LAYERWISE_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JOB = """name: tiny
data: {length: 32, tokenizer: {kind: bytes}}
model: {preset: decoder, stack: {depth: 2, width: 16, layer: {heads: 2}}}
stages:
  fit: {train: causal-lm, steps: 2, batch: 4}
  cut: {edit: drop-layers, count: 1}
  measure: {evaluate: language-modeling}
"""
PIECES = ["&a", "*a", "<<: *a", "!!python/object/apply:os.system [ls]", "!!binary x", "2001-99-99", "9" * 5000, "0x" + "f" * 500, ".nan", "- ", ": ", "{", "}", "[" * 90, "\n", "  ", "? ", "'", '"\\ud800"', "../x", "null", "\t", "1e999", "~", "!!set {a}", "=", "depth: 1000000000", "width: -1"]  # fmt: skip


def _refused(path: Path) -> str:
    before = sorted(path.parent.rglob("*"))
    result = CliRunner().invoke(app, ["run", str(path), "--out", str(path.parent / "run"), "--quiet"])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and "Traceback" not in result.output, result.output
    assert sorted(path.parent.rglob("*")) == before, "something was written"
    return result.stderr


@fuzz
@given(
    st.lists(st.tuples(st.integers(0, len(JOB)), st.integers(0, 6), st.one_of(st.sampled_from(PIECES), st.text(max_size=4))), max_size=3)
)
def test_job_files(tmp_path: Path, changes: list[tuple[int, int, str]]) -> None:
    text = JOB
    for place, cut, piece in changes:
        text = text[:place] + piece + text[place + cut :]
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        check_job(read_job(path))
    except BadInput:
        return


@pytest.mark.parametrize("piece", PIECES)
def test_single_settings(piece: str) -> None:
    try:
        check_job(read_job(yaml.safe_load(JOB), settings=dict((setting(f"stages.fit.steps={piece}"),))))
    except BadInput:
        return


HOSTILE = {
    "a yaml bomb": ("a: &a [x,x]\nb: &b [*a,*a]\n", "aliases"),
    "deep": ("a: " + "[" * 500 + "]" * 500, "nested too deeply"),
    "a number without end": (JOB.replace("steps: 2", "steps: " + "9" * 5000), "not YAML"),
    "a large number": (JOB.replace("steps: 2", "steps: 0x" + "f" * 500), "a number of 2,000 bits is too large"),
    "a file without end": (JOB + "notes: [" + "x, " * 100_000 + "]", "too large for a job file"),
    "a stage that climbs out": (JOB.replace("fit:", "../fit:"), "names a folder"),
    "an absolute stage": (JOB.replace("fit:", "/tmp/fit:"), "names a folder"),
    "a variant that climbs out": (JOB + "variants: {'..': {}}", "names a folder"),
    "a name that climbs out": (JOB.replace("tiny", "../tiny"), "name"),
    "a long name": (JOB.replace("fit:", "f" * 300 + ":"), "at most 80"),
    "a python object": (JOB + "notes: !!python/object/apply:os.system [touch ran]", "not YAML"),
    "billions of layers": (JOB.replace("depth: 2", "depth: 2000000000"), "at most 10,000 layers"),
    "augmented text": (JOB.replace("length: 32", "length: 32, augment: {flip: true}"), "data.augment changes images"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_jobs(tmp_path: Path, name: str) -> None:
    text, message = HOSTILE[name]
    (tmp_path / "job.yaml").write_text(text)
    assert message in _refused(tmp_path / "job.yaml")


def test_a_description_of_billions_of_layers_is_refused_before_it_is_spelled_out() -> None:
    with pytest.raises(ValueError, match="at most 10,000 layers"):
        model_spec({"stack": {"depth": 2 * 10**9}})


TENSORS = save({"a": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.int64)})


def _read(path: Path) -> None:
    for read in (load_tensors, tensor_names):
        try:
            read(path)
        except BadInput as error:
            assert str(path) in str(error)


@fuzz
@given(st.lists(st.tuples(st.integers(0, len(TENSORS) - 1), st.binary(min_size=1, max_size=8)), max_size=4), st.integers(0, len(TENSORS)))
def test_bytes_of_tensors(tmp_path: Path, changes: list[tuple[int, bytes]], size: int) -> None:
    content = bytearray(TENSORS)
    for place, piece in changes:
        content[place : place + len(piece)] = piece
    (tmp_path / "x.safetensors").write_bytes(content[: size or None])
    _read(tmp_path / "x.safetensors")


NUMBER = st.one_of(st.integers(-3, 60), st.sampled_from([2**31, 2**62, 2**64 - 1, 10**30]))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "I8", "BOOL", "F8_E4M3", "F4", "C64", "X", None]),
        "shape": st.lists(NUMBER, max_size=3),
        "data_offsets": st.lists(NUMBER, min_size=1, max_size=3),
    }
)


@fuzz
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), st.one_of(ENTRY, st.none(), st.integers())),
    st.sampled_from([0, 1, -1, 10**6, 2**40]),
)
def test_headers_of_tensors(tmp_path: Path, header: dict[str, Any], lie: int) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(max(len(text) + lie, 0).to_bytes(8, "little") + text + bytes(64))
    _read(tmp_path / "x.safetensors")


@fuzz
@given(st.data())
def test_tokenizer_files(tmp_path: Path, text: Any, data: st.DataObject) -> None:
    plain = text.tokenizer.to_str()
    place = data.draw(st.integers(0, len(plain)))
    piece = data.draw(st.one_of(st.text(max_size=5), st.sampled_from(["null", "{}", "[]", "-1", "1e99", '"x"'])))
    changed = plain[:place] + piece + plain[place + data.draw(st.integers(0, 9)) :]
    (tmp_path / "tokenizer.json").write_bytes(changed.encode("utf-8", "surrogatepass"))
    try:
        tokenizer = read_tokenizer(str(tmp_path / "tokenizer.json"))
        list(encoded(tokenizer, ["The fox <eos> leaps\n over 狐 \u0000 2 walls.", ""]))
        special_ids(tokenizer)
    except BadInput:
        return


@pytest.mark.parametrize("expression", ["((a*)*)*$", "(a|aa)+$", "(?:a+)+b", "(", "\\\\1", "(?<=a*)b"])
def test_a_tokenizer_s_expression_without_end_is_stopped(tmp_path: Path, text: Any, expression: str) -> None:
    changed = json.loads(text.tokenizer.to_str())
    bytes_ = changed["pre_tokenizer"]
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    changed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_]}
    changed["model"]["vocab"]["one more"] = 262  # not plain bytes, which are read without the library
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    began = time.monotonic()
    with contextlib.suppress(BadInput):
        list(encoded(read_tokenizer(str(tmp_path / "tokenizer.json")), ["a" * 200 + "!"]))
    assert time.monotonic() - began < 20


def test_augmented_text_is_refused(verses: Path) -> None:
    with pytest.raises(BadInput, match="data.augment changes images"):
        load_data(DataSpec(source=f"path:{verses}", augment=AugmentSpec(flip=True)))
