"""Jobs that cannot work: one clear message, exit code 2, and nothing loaded, trained or written."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from layerwise.cli import app

GONE = object()
"""As a value in a case: take the key out."""

BASE: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "builtin:docs", "length": 32, "tokenizer": {"kind": "bytes"}},
    "model": {"preset": "decoder", "stack": {"depth": 2, "width": 16, "layer": {"heads": 2}}},
    "stages": {
        "pretrain": {"train": "causal-lm", "steps": 2, "batch": 4, "optimizer": {"lr": 1e-3}, "schedule": {"name": "cosine"}},
        "cut": {"edit": "drop-layers", "count": 1},
        "measure": {"evaluate": "language-modeling"},
    },
}


def altered(changes: dict[str, Any]) -> dict[str, Any]:
    """The base job with the values at some paths (parts between slashes) replaced or taken out."""
    job = copy.deepcopy(BASE)
    for path, value in changes.items():
        *inner, last = path.split("/")
        place = job
        for part in inner:
            place = place.setdefault(part, {})
        if value is GONE:
            del place[last]
        else:
            place[last] = value
    return job


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading data or making a model fails the test."""

    def started(*_: Any, **__: Any) -> None:
        pytest.fail("a job that cannot work was started")

    for place in (
        "layerwise.jobs.run.load_data",
        "layerwise.jobs.run.build",
        "layerwise.jobs.run.load_any",
        "layerwise.models.model.build",
    ):
        monkeypatch.setattr(place, started)


def refused(tmp_path: Path, job: dict[str, Any] | str | bytes, pattern: str, *arguments: str, out: Path | None = None) -> str:
    """Run a job through the command line and check that it is refused as it should be; returns the message."""
    file = tmp_path / "job.yaml"
    text = yaml.safe_dump(job, sort_keys=False) if isinstance(job, dict) else job
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    folder = out or tmp_path / "run"
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["run", str(file), "--out", str(folder), "--quiet", *arguments])
    told = result.stderr
    assert result.exit_code == 2, f"exit code {result.exit_code}: {result.output}\n{result.exception!r}"
    assert told.startswith("error: "), told
    assert told.count("error: ") == 1 and "Traceback" not in result.output
    # No jargon of the libraries behind it, no wall of text.
    assert len(told) < 700, told
    for jargon in ("pydantic", "ValidationError", "Input should be a valid dictionary or instance", "NoneType", "ArgsKwargs"):
        assert jargon not in told, told
    assert re.search(pattern, told, re.DOTALL), f"{told!r} does not say {pattern!r}"
    assert sorted(tmp_path.rglob("*")) == before, "something was written"
    return told


def test_base_job_passes_every_check(tmp_path: Path) -> None:
    # What the cases below start from is itself in order: otherwise they would pass for the wrong reason.
    from layerwise.jobs.check import check_job
    from layerwise.jobs.schema import read_job

    plans = check_job(read_job(copy.deepcopy(BASE)))
    assert [stage.name for stage in plans["default"].stages] == ["pretrain", "cut", "measure"]


def test_numbers_and_slices_are_read_as_people_write_them(tmp_path: Path) -> None:
    from layerwise.jobs.schema import read_job

    file = tmp_path / "job.yaml"
    file.write_text("""
name: tiny
model: {preset: decoder, stack: {depth: 8, width: 16, layer: {heads: 2}, overrides: {3: {heads: 4}, 4:6: {heads: 1}, -1: {norm_eps: 1e-8}}}}
stages: {fit: {train: causal-lm, steps: 1, optimizer: {lr: 1e-3, depth_lr: {0: 0.5}, options: {eps: 1e-8}}}}
""")
    plan = read_job(file, settings={}).plans()["default"]
    layers = plan.model.stack.layers
    assert [layer.heads for layer in layers] == [2, 2, 2, 4, 1, 1, 2, 2]
    assert layers[-1].norm_eps == 1e-8
    assert plan.stages[0].spec.optimizer.options == {"eps": 1e-8}
    assert plan.stages[0].spec.optimizer.depth_lr == {"0": 0.5}


UNKNOWN_KEYS = {
    "job": ({"modle": {}}, r"modle: unknown key.*Did you mean 'model'"),
    "data": ({"data/lenght": 3}, r"data\.lenght: unknown key.*'length'"),
    "tokenizer": ({"data/tokenizer/vocabulary": 300}, r"data\.tokenizer\.vocabulary: unknown key.*'vocab'"),
    "augment": ({"data/augment": {"flips": True}}, r"data\.augment\.flips: unknown key.*'flip'"),
    "model": ({"model/heads": {}}, r"model\.heads: unknown key.*'head'"),
    "stack": ({"model/stack/dept": 2}, r"model\.stack\.dept: unknown key.*'depth'"),
    "layer": ({"model/stack/layer/headz": 2}, r"model\.stack\.layer\.headz: unknown key.*'heads'"),
    "linear": ({"model/stack/layer/linears": {"q": {"rnak": 2}}}, r"model\.stack\.layer\.linears\.q\.rnak: unknown key.*'rank'"),
    "overrides": ({"model/stack/overrides": {"0": {"placemnt": "post"}}}, r"overrides.*0.*placemnt.*'placement'"),
    "head": ({"model/head": {"kind": "lm", "tied": True}}, r"model\.head\.tied: unknown key.*'tie'"),
    "embedding": ({"model/embedding": {"vocabs": 9}}, r"model\.embedding\.vocabs: unknown key.*'vocab'"),
    "decoder": ({"model/decoder": {"dept": 1}}, r"model\.decoder\.dept: unknown key.*'depth'"),
    "plain layer": (
        {"model": {"preset": "mlp", "stack": {"layers": [{"chanels": 3}]}}},
        r"model\.stack(\.layers)?\.0\.chanels: unknown key.*'channels'",
    ),
    "pixels": ({"model": {"preset": "mlp", "embedding": {"flaten": True}}}, r"model\.embedding\.flaten: unknown key.*'flatten'"),
    "training stage": ({"stages/pretrain/epoch": 2}, r"stages\.pretrain\.epoch: unknown key.*'epochs'"),
    "optimizer": (
        {"stages/pretrain/optimizer/weight_deacy": 0.1},
        r"stages\.pretrain\.optimizer\.weight_deacy: unknown key.*'weight_decay'",
    ),
    "optimizer options": ({"stages/pretrain/optimizer/options": {"beta": [0.9, 0.9]}}, r"stages\.pretrain: .*adamw.*'beta'.*'betas'"),
    "optimizer option of a wrong kind": (
        {"stages/pretrain/optimizer/options": {"betas": "high"}},
        r"stages\.pretrain: optimizer: 'adamw' cannot have.*high",
    ),
    "optimizer option out of range": (
        {"stages/pretrain/optimizer/options": {"betas": [0.9, 2.0]}},
        r"stages\.pretrain: optimizer: 'adamw' cannot have.*2\.0",
    ),
    "schedule": ({"stages/pretrain/schedule/warm_up": 1}, r"stages\.pretrain\.schedule\.warm_up: unknown key.*'warmup'"),
    "policy options": (
        {"stages/pretrain/policies": [{"name": "rotation", "evry": 2}]},
        r"stages\.pretrain: policies\.rotation.*'evry'.*'every'",
    ),
    "objective options": ({"stages/pretrain/options": {"rate": 0.1}}, r"stages\.pretrain: options.*'rate'"),
    "edit options": ({"stages/cut/cuont": 1}, r"stages\.cut: .*'cuont'.*'count'"),
    "evaluation options": ({"stages/measure/batches": 1}, r"stages\.measure: .*'batches'.*'batch"),
    "analysis options": ({"stages/look": {"analyze": "inspect", "sample": 1}}, r"stages\.look: .*'sample'.*'samples'"),
    "generate options": ({"stages/say": {"generate": "a", "news": 1}}, r"stages\.say\.news: unknown key.*'new'"),
    "export options": ({"stages/say": {"export": "hf", "dtyp": "float32"}}, r"stages\.say\.dtyp: unknown key.*'dtype'"),
    "claim": (
        {"claim": {"text": "t", "metric": "val_loss", "direction": "lower", "method": "default", "baselin": "default"}},
        r"claim\.baselin: unknown key.*'baseline'",
    ),
    "paper": ({"paper": {"title": "t", "year": 2000, "arxvi": "1"}}, r"paper\.arxvi: unknown key.*'arxiv'"),
    "relations": ({"relations": [{"x": "a", "y": "b", "abov": {}}]}, r"relations\.0\.abov: unknown key.*'above'"),
    "variant": ({"variants": {"a": {"model.stack.detph": 3}}}, r"variants?\.a.*model\.stack\.detph: unknown key.*'depth'"),
    "variant's section": ({"variants": {"a": {"modle.stack": 3}}}, r"variants\.a.*modle"),
    "scale": ({"scales": {"large": {}}}, r"scales.*large"),
    "scale's path": ({"scales": {"small": {"model.stak.depth": 2}}}, r"model\.stak: unknown key.*'stack'"),
}


@pytest.mark.parametrize(("changes", "pattern"), UNKNOWN_KEYS.values(), ids=list(UNKNOWN_KEYS))
def test_unknown_key_is_named_with_its_path_and_nearest_known_one(tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    refused(tmp_path, altered(changes), pattern)


WRONG_TYPES = {
    "depth is text": ({"model/stack/depth": "two"}, r"model\.stack\.depth: .*integer.*'two'"),
    "depth is a list": ({"model/stack/depth": [2]}, r"model\.stack\.depth: .*integer"),
    "width is a fraction": ({"model/stack/width": 16.5}, r"model\.stack\.width: .*16\.5"),
    "width is zero": ({"model/stack/width": 0}, r"model\.stack.*width.*0"),
    "depth is enormous": ({"model/stack/depth": 10**9}, r"model\.stack\.depth: at most 10,000 layers; got 1,000,000,000"),
    "seed is enormous": ({"seeds": [10**30]}, r"seeds\.0: 1e\+30 is too large"),
    "depth is negative": ({"model/stack/depth": -1}, r"model\.stack.*depth.*-1"),
    "stack is a list": ({"model/stack": [1, 2]}, r"model\.stack: .*mapping"),
    "layer is text": ({"model/stack/layer": "attention"}, r"model\.stack\.layer: .*mapping"),
    "layer is nothing": ({"model/stack/layer": None}, r"model\.stack\.layer: .*mapping"),
    "model is text": ({"model": "decoder"}, r"model: .*mapping"),
    "data is text": ({"data": "builtin:docs"}, r"data: .*mapping"),
    "stages is a list": ({"stages": [{"train": "causal-lm", "steps": 1}]}, r"stages: .*mapping"),
    "a stage is text": ({"stages/measure": "language-modeling"}, r"stages\.measure: .*mapping"),
    "variants is a list": ({"variants": ["a", "b"]}, r"variants: .*mapping"),
    "a variant is text": ({"variants": {"a": "post"}}, r"variants\.a: .*mapping"),
    "scales is a list": ({"scales": [1]}, r"scales: .*mapping"),
    "a scale is text": ({"scales": {"small": "fast"}}, r"scales\.small: .*mapping"),
    "steps is text": ({"stages/pretrain/steps": "many"}, r"stages\.pretrain\.steps: .*'many'"),
    "steps is true": ({"stages/pretrain/steps": True}, r"stages\.pretrain\.steps: .*True"),
    "steps is zero": ({"stages/pretrain/steps": 0}, r"stages\.pretrain.*steps must be positive; it is 0"),
    "steps is negative": ({"stages/pretrain/steps": -5}, r"stages\.pretrain.*steps must be positive; it is -5"),
    "epochs is not a number": ({"stages/pretrain/steps": GONE, "stages/pretrain/epochs": math.nan}, r"stages\.pretrain.*epochs.*nan"),
    "epochs is infinite": ({"stages/pretrain/steps": GONE, "stages/pretrain/epochs": math.inf}, r"stages\.pretrain.*epochs.*inf"),
    "batch is zero": ({"stages/pretrain/batch": 0}, r"stages\.pretrain.*batch must be positive"),
    "lr is zero": ({"stages/pretrain/optimizer/lr": 0}, r"stages\.pretrain\.optimizer.*lr must be positive; it is 0"),
    "lr is not a number": ({"stages/pretrain/optimizer/lr": math.nan}, r"stages\.pretrain\.optimizer.*lr.*nan"),
    "lr is infinite": ({"stages/pretrain/optimizer/lr": math.inf}, r"stages\.pretrain\.optimizer.*lr.*inf"),
    "lr is text": ({"stages/pretrain/optimizer/lr": "fast"}, r"stages\.pretrain\.optimizer\.lr: .*'fast'"),
    "weight decay is negative": ({"stages/pretrain/optimizer/weight_decay": -1}, r"weight_decay is >= 0"),
    "weight decay is not a number": ({"stages/pretrain/optimizer/weight_decay": math.nan}, r"weight_decay.*nan"),
    "layer decay is above one": ({"stages/pretrain/optimizer/layer_decay": 1.5}, r"layer_decay in \(0, 1\].*1\.5"),
    "clip is negative": ({"stages/pretrain/clip": -1}, r"clip must be positive"),
    "clip is not a number": ({"stages/pretrain/clip": math.nan}, r"clip.*nan"),
    "warm-up is negative": ({"stages/pretrain/schedule/warmup": -1}, r"warmup >= 0.*-1"),
    "warm-up is not a number": ({"stages/pretrain/schedule/warmup": math.nan}, r"warmup.*nan"),
    "floor is above one": ({"stages/pretrain/schedule/floor": 2}, r"floor in \[0, 1\].*2"),
    "drops beyond the end": ({"stages/pretrain/schedule": {"name": "drops", "drops": {1.5: 0.1}}}, r"drops.*1\.5"),
    "log every zero": ({"stages/pretrain/log_every": 0}, r"log_every must be positive"),
    "divergence not a number": ({"stages/pretrain/divergence": math.nan}, r"divergence.*nan"),
    "policies is a mapping": ({"stages/pretrain/policies": {"name": "freeze"}}, r"stages\.pretrain\.policies: .*(list|tuple)"),
    "a policy is text": ({"stages/pretrain/policies": ["freeze"]}, r"stages\.pretrain\.policies\.0: .*(mapping|dictionary)"),
    "a policy without a name": ({"stages/pretrain/policies": [{"every": 2}]}, r"stages\.pretrain.*policy needs a name"),
    "length is one": ({"data/length": 1}, r"data.*length must be at least 2.*1"),
    "validation share one": ({"data/validation": 1.0}, r"data.*validation.*between 0 and 1.*1"),
    "validation share not a number": ({"data/validation": math.nan}, r"data.*validation.*nan"),
    "documents one": ({"data/documents": 1}, r"data.*documents must be at least 2"),
    "vocabulary too small": ({"data/tokenizer": {"kind": "bpe", "vocab": 10}}, r"data\.tokenizer.*at least 300; it is 10"),
    "seeds is a number": ({"seeds": 3}, r"seeds: .*list"),
    "seeds is text": ({"seeds": ["zero"]}, r"seeds\.0: .*'zero'"),
    "seeds twice": ({"seeds": [0, 1, 0]}, r"seeds are distinct.*\[0, 1, 0\]"),
    "seeds negative": ({"seeds": [-1]}, r"seeds are distinct numbers >= 0.*-1"),
    "seeds empty": ({"seeds": []}, r"seeds: .*at least 1"),
    "seeds true": ({"seeds": [True]}, r"seeds\.0: .*True"),
    "year is text": ({"paper": {"title": "t", "year": "last"}}, r"paper\.year: .*'last'"),
    "name with blanks": ({"name": "My Job"}, r"name: .*'My Job'"),
    "name is a path": ({"name": "../x"}, r"name: .*'\.\./x'"),
    "name missing": ({"name": GONE}, r"name: this key is required"),
    "model missing": ({"model": GONE}, r"model: this key is required"),
    "stages missing": ({"stages": GONE}, r"stages: this key is required"),
    "stages empty": ({"stages": {}}, r"stages: .*at least 1"),
    "variants empty": ({"variants": {}}, r"variants: .*at least 1"),
    "new is zero": ({"stages/say": {"generate": "a", "new": 0}}, r"stages\.say\.new: .*0"),
    "temperature is negative": ({"stages/say": {"generate": "a", "temperature": -1}}, r"stages\.say\.temperature: .*-1"),
    "temperature is not a number": ({"stages/say": {"generate": "a", "temperature": math.nan}}, r"stages\.say\.temperature: .*nan"),
    "top-p above one": ({"stages/say": {"generate": "a", "top_p": 1.5}}, r"stages\.say\.top_p: .*1\.5"),
    "no prompts": ({"stages/say": {"generate": []}}, r"stages\.say\.prompts: .*at least 1"),
    "an empty prompt": ({"stages/say": {"generate": [""]}}, r"stages\.say\.prompts.*(empty|at least 1)"),
    "prompts are numbers": ({"stages/say": {"generate": [1]}}, r"stages\.say\.prompts\.0: .*string"),
    "samples negative": ({"stages/cut/samples": -4}, r"stages\.cut.*samples.*-4"),
    "batches zero": ({"stages/measure/batches_at_most": 0}, r"stages\.measure.*batches_at_most.*0"),
    "split unknown": ({"stages/measure/split": "held-out"}, r"stages\.measure.*held-out"),
    "scale unknown": ({"scale": "huge"}, r"scale.*huge"),
}


@pytest.mark.parametrize(("changes", "pattern"), WRONG_TYPES.values(), ids=list(WRONG_TYPES))
def test_wrong_value_is_told_with_its_path_and_what_was_given(tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    refused(tmp_path, altered(changes), pattern)


CLAIM = {"text": "t", "metric": "val_loss", "direction": "lower", "method": "b", "baseline": "a"}
ARMS = {"a": {}, "b": {"model.stack.layer.placement": "post"}}
UNKNOWN_NAMES = {
    "objective": ({"stages/pretrain/train": "casual-lm"}, r"stages\.pretrain\.train: unknown objective 'casual-lm'.*'causal-lm'"),
    "edit": ({"stages/cut/edit": "drop-layer"}, r"stages\.cut\.edit: unknown edit 'drop-layer'.*'drop-layers'"),
    "analysis": ({"stages/look": {"analyze": "inspec"}}, r"stages\.look\.analyze: unknown analysis 'inspec'.*'inspect'"),
    "evaluation": (
        {"stages/measure/evaluate": "language"},
        r"stages\.measure\.evaluate: unknown evaluation 'language'.*'language-modeling'",
    ),
    "evaluation is a number": ({"stages/measure/evaluate": 3}, r"stages\.measure\.evaluate: unknown evaluation '3'"),
    "edit is a list": ({"stages/cut/edit": ["lora"]}, r"stages\.cut\.edit: unknown edit"),
    "optimizer": ({"stages/pretrain/optimizer/name": "adamv"}, r"stages\.pretrain\.optimizer.*unknown optimizer 'adamv'.*'adamw?'"),
    "policy": ({"stages/pretrain/policies": [{"name": "freez"}]}, r"stages\.pretrain.*unknown policy 'freez'.*'freeze'"),
    "schedule": ({"stages/pretrain/schedule/name": "cosin"}, r"stages\.pretrain\.schedule\.name: .*'cosine'.*'cosin'"),
    "precision": ({"stages/pretrain/precision": "fp8"}, r"stages\.pretrain\.precision: .*'fp32'.*'fp8'"),
    "preset": ({"model/preset": "decodr"}, r"preset 'decodr'.*'decoder'"),
    "preset is a list": ({"model/preset": ["decoder"]}, r"model.preset.*decoder"),
    "built-in corpus": ({"data/source": "builtin:doc"}, r"built-in corpus 'doc'.*'docs'"),
    "kind of source": ({"data/source": "bultin:docs"}, r"data\.source 'bultin:docs'.*'builtin'"),
    "source without a name": ({"data/source": "builtin:"}, r"data\.source 'builtin:' names nothing"),
    "source is a way out": ({"data/source": "../secrets"}, r"data\.source '\.\./secrets' is not a set's name"),
    "named set, no folder": ({"data/source": "mnist"}, r"'mnist'.*--data-dir"),
    "mixer": ({"model/stack/layer/mixer": "atention"}, r"mixer 'atention'.*'attention'"),
    "placement": ({"model/stack/layer/placement": "per"}, r"model\.stack\.layer\.placement: .*'pre'.*'per'"),
    "norm": ({"model/stack/layer/norm": "rms"}, r"model\.stack\.layer\.norm: .*'rmsnorm'.*'rms'"),
    "linear's kind": ({"model/stack/layer/linears": {"q": {"kind": "lowrank"}}}, r"linears?.*'?lowrank'?.*(dense|lora)"),
    "linear's role": ({"model/stack/layer/linears": {"query": {"kind": "lora", "rank": 2}}}, r"linears?.*'query'.*Known"),
    "embedding's kind": ({"model/embedding": {"kind": "token"}}, r"model\.embedding.*token"),
    "head's kind": ({"model/head": {"kind": "classify"}}, r"model\.head\.kind: .*'classifier'.*'classify'"),
    "plain layer's kind": (
        {"model": {"preset": "mlp", "stack": {"layers": [{"kind": "dens"}]}}},
        r"model\.stack(\.layers)?\.0\.kind: .*'dense'.*'dens'",
    ),
    "tokenizer's kind": ({"data/tokenizer": {"kind": "bp"}}, r"data\.tokenizer\.kind: .*'bpe'.*'bp'"),
    "rule": ({"stages/cut/rule": "angle"}, r"stages\.cut.*rule.*'angular'.*'angle'"),
    "export format": ({"stages/write": {"export": "onnx"}}, r"stages\.write\.format: .*'hf'.*'onnx'"),
    "tracker": ({"trackers": ["wandb"]}, r"trackers\.0: .*'tensorboard'.*'wandb'"),
    "on_divergence": ({"on_divergence": "ignore"}, r"on_divergence: .*'stop'.*'ignore'"),
    "claim's direction": ({"variants": ARMS, "claim": {**CLAIM, "direction": "down"}}, r"claim\.direction: .*'lower'.*'down'"),
    "claim's method": ({"variants": ARMS, "claim": {**CLAIM, "method": "bb"}}, r"claim\.method: there is no variant 'bb'.*'b'"),
    "claim's baseline": ({"variants": ARMS, "claim": {**CLAIM, "baseline": "c"}}, r"claim\.baseline: there is no variant 'c'.*a, b"),
    "claim compares a variant with itself": ({"variants": ARMS, "claim": {**CLAIM, "baseline": "b"}}, r"claim.*'b'.*(two|itself|differ)"),
    "variant's name is a path": ({"variants": {"a/../../b": {}}}, r"variants.*a/\.\./\.\./b"),
    "stage's name is a path": ({"stages/..": {"evaluate": "language-modeling"}}, r"stages.*\.\."),
    "layer of depth_lr": ({"stages/pretrain/optimizer/depth_lr": {"7": 0.1}}, r"stages\.pretrain.*layer 7 is out of range.*0 to 1"),
    "layer to freeze": ({"stages/pretrain/policies": [{"name": "freeze", "layers": [9]}]}, r"stages\.pretrain.*layer 9 is out of range"),
    "layer dropout's rate": ({"stages/pretrain/policies": [{"name": "layer-dropout", "rate": 1.5}]}, r"stages\.pretrain.*rate.*1\.5"),
    "policy every zero": ({"stages/pretrain/policies": [{"name": "rotation", "every": 0}]}, r"stages\.pretrain.*every.*0"),
}


@pytest.mark.parametrize(("changes", "pattern"), UNKNOWN_NAMES.values(), ids=list(UNKNOWN_NAMES))
def test_unknown_name_is_answered_with_the_known_ones(tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    refused(tmp_path, altered(changes), pattern)


LAYER = "model/stack/layer/"
SHAPES = {
    "heads do not divide width": ({LAYER + "heads": 3}, r"heads \(3\) does not divide width \(16\).*use heads=(2|4)"),
    "odd rotary head": ({"model/stack/width": 6, LAYER + "heads": 2}, r"even head size; width 6 / heads 2 gives 3"),
    "kv_heads do not divide heads": ({LAYER + "heads": 4, LAYER + "kv_heads": 3}, r"heads \(4\) must be a multiple of kv_heads \(3\)"),
    "more kv_heads than heads": ({LAYER + "heads": 2, LAYER + "kv_heads": 4}, r"heads \(2\) must be a multiple of kv_heads \(4\)"),
    "heads zero": ({LAYER + "heads": 0}, r"heads must be at least 1; it is 0"),
    "window zero": ({LAYER + "window": 0}, r"window must be at least 1; it is 0"),
    "dropout one": ({LAYER + "dropout": 1.0}, r"dropout is a probability in \[0, 1\); it is 1"),
    "dropout negative": ({LAYER + "attention_dropout": -0.1}, r"attention_dropout is a probability"),
    "dropout not a number": ({LAYER + "drop": math.nan}, r"layer\.drop: a finite number is expected; got nan"),
    "vocabulary zero": ({"model/embedding": {"vocab": 0}}, r"vocab must be at least 1"),
    "vocabulary below the tokenizer's": ({"model/embedding": {"vocab": 40}}, r"model\.embedding\.vocab.*40.*262"),
    "positions fewer than tokens": ({"model/embedding": {"position": "learned", "max_length": 8}}, r"max_length.*8.*32"),
    "override beyond the end": ({"model/stack/overrides": {"5": {"heads": 1}}}, r"layer 5 is out of range.*0 to 1"),
    "override below the start": ({"model/stack/overrides": {"-3": {"heads": 1}}}, r"layer -3 is out of range"),
    "slice beyond the end": ({"model/stack/overrides": {"0:9": {"heads": 1}}}, r"slice '0:9' is out of range"),
    "slice of nothing": ({"model/stack/overrides": {"1:1": {"heads": 1}}}, r"slice '1:1' names no layer"),
    "slice step zero": ({"model/stack/overrides": {"::0": {"heads": 1}}}, r"slice '::0' has step 0"),
    "slice of words": ({"model/stack/overrides": {"first": {"heads": 1}}}, r"'first' is neither an index nor a slice"),
    "slice of four parts": ({"model/stack/overrides": {"0:1:1:1": {"heads": 1}}}, r"'0:1:1:1' is neither an index nor a slice"),
    "override of a wrong type": ({"model/stack/overrides": {"0": {"heads": "two"}}}, r"override.*heads.*(integer|'two')"),
    "override breaks the heads": ({"model/stack/overrides": {"1": {"heads": 5}}}, r"heads \(5\) does not divide width \(16\) in layer 1"),
    "override changes the width": ({"model/stack/overrides": {"1": {"width": 8}}}, r"width.*layer 1|layer 1.*width"),
    "lora without rank": ({LAYER + "linears": {"q": {"kind": "lora"}}}, r"lora linear needs rank >= 1"),
    "cross without decoder": ({LAYER + "cross": True}, r"cross: true needs something to look at"),
    "decoder without cross": ({"model/decoder": {"depth": 1, "width": 16, "layer": {"heads": 2}}}, r"cross: true and causal: true"),
    "text model with a source": (
        {"model/decoder": {"depth": 1, "width": 16, "layer": {"heads": 2, "cross": True, "causal": True}}, "model/stack/width": 16},
        r"stages\.\w+.*needs a source and a target",
    ),
    "dense layers on text": ({"model": {"stack": {"layers": [{"kind": "dense", "channels": 4}]}}}, r"embedding\.kind to pixels"),
    "no plain layers": ({"model": {"preset": "mlp", "stack": {"layers": []}}}, r"layers is empty"),
    "plain layers do not fit": (
        {"model": {"preset": "mlp", "stack": {"layers": [{"channels": 4}, {"channels": 4, "inner": 8}]}}},
        r"layer 1 takes 8 channels but the layer below makes 4",
    ),
    "group norm does not divide": (
        {"model": {"preset": "vgg", "stack": {"layers": [{"channels": 6, "norm": "group", "group": 4}]}}},
        r"channels \(6\).*multiple of group \(4\)",
    ),
    "accumulate does not divide": ({"stages/pretrain/accumulate": 3}, r"batch \(4\) must be a multiple of accumulate \(3\)"),
    "steps and epochs": ({"stages/pretrain/epochs": 1}, r"either steps or epochs"),
    "neither steps nor epochs": ({"stages/pretrain/steps": GONE}, r"either steps or epochs"),
    "loaded and described": ({"model/load": "somewhere"}, r"model\.(preset|stack): a loaded model brings its own description"),
    "load is a number": ({"model": {"load": 3}}, r"model\.load: a folder's path.*3"),
    "load nothing": ({"model": {"load": "no/such/folder"}}, r"model\.load: there is no folder no/such/folder"),
}


@pytest.mark.parametrize(("changes", "pattern"), SHAPES.values(), ids=list(SHAPES))
def test_impossible_shape_is_refused_before_anything_is_made(tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    refused(tmp_path, altered(changes), pattern)


UNCHECKED = {
    "validation every so many steps, negative": ({"stages/pretrain/val_every": -1}, r"val_every.*-1"),
    "validation batches zero": ({"stages/pretrain/val_batches": 0}, r"val_batches.*0"),
    "embedding's dropout": ({"model/embedding": {"dropout": 1.5}}, r"model\.embedding.*dropout.*1\.5"),
    "head's dropout": ({"model/head": {"kind": "lm", "dropout": -1}}, r"model\.head.*dropout.*-1"),
    "norm's epsilon negative": ({LAYER + "norm_eps": -1}, r"norm_eps.*-1"),
    "rope base zero": ({LAYER + "rope_theta": 0}, r"rope_theta.*0"),
    "initial deviation negative": ({"model/stack/init_std": -0.1}, r"init_std.*-0\.1"),
}


@pytest.mark.parametrize(("changes", "pattern"), UNCHECKED.values(), ids=list(UNCHECKED))
def test_number_out_of_its_range_is_refused(tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    refused(tmp_path, altered(changes), pattern)


ENCODER = {"model": {"preset": "encoder", "stack": {"depth": 2, "width": 16, "layer": {"heads": 2}}}}
IMAGES = {"data": {"source": "builtin:digits"}, "model": {"preset": "mlp"}}
STAGES = {
    "two verbs": ({"stages/cut/train": "causal-lm"}, r"stages\.cut: .*exactly one.*has train, edit"),
    "no verb": ({"stages/cut": {"count": 1}}, r"stages\.cut: .*exactly one.*has none"),
    "a misspelt verb": ({"stages/cut": {"edits": "drop-layers"}}, r"stages\.cut: .*exactly one"),
    "an empty stage": ({"stages/cut": {}}, r"stages\.cut: .*exactly one.*has none"),
    "drop both": ({"stages/cut/layers": [0]}, r"stages\.cut: drop-layers needs either count or layers"),
    "drop neither": ({"stages/cut/count": GONE}, r"stages\.cut: drop-layers needs either count or layers"),
    "drop more than there are": ({"stages/cut/count": 3}, r"stages\.cut: cannot drop 3 layers of a stack of 2"),
    "drop a negative number": ({"stages/cut/count": -1}, r"stages\.cut: cannot drop -1 layers"),
    "drop a layer that is not there": ({"stages/cut": {"edit": "drop-layers", "layers": [0, 2]}}, r"cannot drop layer 2.*0 to 1"),
    "drop by words": ({"stages/cut": {"edit": "drop-layers", "layers": "last"}}, r"stages\.cut.*layers.*'last'"),
    "drop a share": ({"stages/cut/count": 0.5}, r"stages\.cut.*count.*0\.5"),
    "drop all, deepest first": ({"stages/cut": {"edit": "drop-layers", "count": 2, "rule": "deepest"}}, r"keeps the last layer"),
    "drop too many in two stages": ({"stages/again": {"edit": "drop-layers", "count": 2}}, r"stages\.again: cannot drop 2.*stack of 1"),
    "lora twice": (
        {"stages/one": {"edit": "lora", "rank": 2}, "stages/two": {"edit": "lora", "rank": 2}},
        r"stages\.two: this model has LoRA already.*merge",
    ),
    "lora rank zero": ({"stages/one": {"edit": "lora", "rank": 0}}, r"stages\.one: .*rank >= 1; rank is 0"),
    "lora on nothing": ({"stages/one": {"edit": "lora", "targets": ["cross.q"]}}, r"stages\.one: no layer has a linear called cross\.q"),
    "lora on an unknown matrix": ({"stages/one": {"edit": "lora", "targets": ["query"]}}, r"stages\.one: lora\.targets\.0: .*'q'.*'query'"),
    "lora dropout one": ({"stages/one": {"edit": "lora", "dropout": 1.0}}, r"stages\.one.*dropout.*1"),
    "lora on images": (
        {**IMAGES, "stages": {"fit": {"train": "classification", "steps": 1}, "low": {"edit": "lora"}}},
        r"stages\.low: lora needs transformer layers",
    ),
    "masked objective on causal layers": ({"stages/pretrain/train": "masked-lm"}, r"stages\.pretrain: masked-lm needs layers that see both"),
    "causal objective on an encoder": (ENCODER, r"stages\.pretrain: causal-lm needs causal layers"),
    "classifier missing": ({"stages/fit": {"train": "classification", "steps": 1}}, r"stages\.fit: classification needs.*kind classifier"),
    "lm head missing": ({"model/head": None}, r"stages\.pretrain: causal-lm needs.*kind lm"),
    "classifier in place of an lm head": ({"model/head": {"kind": "classifier", "classes": 2}}, r"causal-lm needs.*has classifier head"),
    "images read as text": ({"data": {"source": "builtin:digits"}}, r"reads text but builtin:digits is images"),
    "text read as images": (
        {"model": {"preset": "mlp"}, "stages": {"fit": {"train": "classification", "steps": 1}}},
        r"reads images but builtin:docs is text",
    ),
    "text read as images, nothing judged": (
        {"model": {"preset": "mlp"}, "stages": {"write": {"export": "layerwise"}}},
        r"reads images but builtin:docs is text",
    ),
    "images continued": (
        {**IMAGES, "stages": {"fit": {"train": "classification", "steps": 1}, "say": {"generate": "a"}}},
        r"stages\.say: only a causal model can generate",
    ),
    "generate with an encoder": (
        {**ENCODER, "stages": {"fit": {"train": "masked-lm", "steps": 1}, "say": {"generate": "a"}}},
        r"stages\.say: only a causal model can generate",
    ),
    "generate without a head": ({"model/head": None, "stages": {"say": {"generate": "a"}}}, r"stages\.say: .*head"),
    "inspect images": (
        {**IMAGES, "stages": {"fit": {"train": "classification", "steps": 1}, "look": {"analyze": "layer-drop"}}},
        r"stages\.look: layer-drop needs.*lm",
    ),
    "export what no family holds": (
        {"model/stack/layer/placement": "post", "stages/write": {"export": "hf"}},
        r"stages\.write: no Hugging Face family can hold this model.*placement.*export: layerwise",
    ),
    "export with low-rank terms": (
        {"stages/low": {"edit": "lora", "rank": 2}, "stages/write": {"export": "hf"}},
        r"stages\.write: no Hugging Face family.*(lora|LoRA)",
    ),
    "export images": (
        {**IMAGES, "stages": {"fit": {"train": "classification", "steps": 1}, "write": {"export": "hf"}}},
        r"stages\.write: no Hugging Face family",
    ),
    "labels that text does not have": (
        {**ENCODER, "model/head": {"kind": "classifier"}, "stages": {"fit": {"train": "classification", "steps": 1}}},
        r"classification.*label|classes",
    ),
    "all stages taken out": (
        {"variants": {"a": {f"stages.{name}": None for name in BASE["stages"]}}},
        r"variants\.a: no stage is left",
    ),
    "path through a number": ({"variants": {"a": {"model.stack.depth.more": 1}}}, r"variants\.a: .*'model\.stack\.depth'.*has no keys"),
    "path through a list": (
        {"stages/say": {"generate": ["a"]}, "variants": {"a": {"stages.say.generate.7": "b"}}},
        r"variants\.a: .*'stages\.say\.generate\.7' is not one of the 1 entries",
    ),
    "wrong in the second variant": (
        {"variants": {"a": {}, "b": {"stages.cut.count": 5}}},
        r"variants\.b: stages\.cut: cannot drop 5 layers of a stack of 2",
    ),
    "claim's metric of no stage": (
        {"variants": ARMS, "claim": {**CLAIM, "metric": "mesure.val_loss"}},
        r"claim\.metric.*'mesure'.*'measure'",
    ),
    "claim without a measuring stage": (
        {"variants": ARMS, "claim": CLAIM, "stages": {"cut": {"edit": "drop-layers", "count": 1}}},
        r"claim\.metric.*no stage.*measures",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "pattern"), STAGES.values(), ids=list(STAGES))
def test_stage_that_cannot_follow_is_refused_before_the_first_one_runs(tmp_path: Path, changes: dict[str, Any], pattern: str) -> None:
    refused(tmp_path, altered(changes), pattern)


DEEP = 20_000
TEXTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", r"job\.yaml.*(is empty|holds NoneType|nothing).*mapping"),
    "only a comment": ("# nothing here\n", r"job\.yaml.*mapping"),
    "a list": ("- name: tiny\n", r"job\.yaml holds a list; a job is a mapping"),
    "a word": ("hello", r"job\.yaml holds .*(str|text|string).*a job is a mapping"),
    "a number": ("7", r"job\.yaml holds .*a job is a mapping"),
    "not YAML": ("name: [1, 2\nmodel: }", r"job\.yaml is not YAML.*line"),
    "tabs": ("name: tiny\n\tmodel: {}", r"job\.yaml is not YAML"),
    "two documents": ("name: a\n---\nname: b\n", r"job\.yaml is not YAML.*(document|one)"),
    "key twice": ("name: a\nmodel: {preset: decoder}\nname: b\n", r"the key 'name' stands twice.*line 3"),
    "inner key twice": ("name: a\nmodel: {preset: decoder, preset: bert}\n", r"the key 'preset' stands twice.*line 2"),
    "aliases": ("name: a\nmodel: &m {preset: decoder}\nstages: {x: *m}\n", r"aliases.*not used in job files.*line 3"),
    "an alias bomb": (
        "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)),
        r"aliases",
    ),
    "an object": ("name: !!python/object/apply:os.system ['true']\n", r"job\.yaml is not YAML.*python/object"),
    "a set of no meaning": ("? [a, b]\n: 1\n", r"job\.yaml is not YAML.*key"),
    "deeply nested lists": ("a: " + "[" * DEEP + "]" * DEEP, r"nested too deeply"),
    "deeply nested maps": ("a: " + "{a: " * 3000 + "1" + "}" * 3000, r"nested too deeply"),
    "somewhat nested": ("name: a\nstages: {s: {analyze: inspect}}\nmodel: " + "{stack: " * 90 + "1" + "}" * 90, r"model|nested"),
    "not text": (b"\xff\xfe\x00name", r"(cannot read|not YAML)"),
    "a NUL": (b"name: a\x00b\n", r"not YAML"),
    "a key that is a number": ("name: a\nmodel: {preset: decoder}\nstages: {1: {evaluate: language-modeling}}\n", r"stages\.1: .*(string|text)"),
    "a key that means yes": ("name: a\nmodel: {preset: decoder}\nstages: {on: {evaluate: language-modeling}}\n", r"stages\.(1|True): .*string"),
    "a top-level key that is a number": ("name: a\n3: 4\nmodel: {}\n", r"3: "),
}  # fmt: skip


@pytest.mark.parametrize(("text", "pattern"), TEXTS.values(), ids=list(TEXTS))
def test_file_that_is_no_job_is_told_as_such(tmp_path: Path, text: str | bytes, pattern: str) -> None:
    refused(tmp_path, text, pattern)


def _empty(folder: Path) -> str:
    (folder / "empty.txt").touch()
    return f"path:{folder / 'empty.txt'}"


def _hollow(folder: Path) -> str:
    (folder / "hollow").mkdir()
    return f"path:{folder / 'hollow'}"


def _archive(folder: Path) -> str:
    (folder / "text.zip").write_bytes(b"PK")
    return f"path:{folder / 'text.zip'}"


FILES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "text missing": (lambda f: {"data/source": f"path:{f}/none.txt"}, r"data\.source: there is no file or folder .*none\.txt"),
    "text empty": (lambda f: {"data/source": _empty(f)}, r"data\.source: .*empty\.txt is empty"),
    "folder empty": (lambda f: {"data/source": _hollow(f)}, r"data\.source: no data files in .*hollow"),
    "kind of file unknown": (lambda f: {"data/source": _archive(f)}, r"data\.source: text\.zip is of a kind.*\.txt"),
    "tokenizer missing": (lambda f: {"data/tokenizer": {"kind": "file", "path": f"{f}/t.json"}}, r"no tokenizer file .*t\.json"),
    "tokenizer not named": (lambda f: {"data/tokenizer": {"kind": "file"}}, r"data\.tokenizer.*needs path"),
    "tokenizer's folder empty": (
        lambda f: {"data/tokenizer": {"kind": "file", "path": _hollow(f)[5:]}},
        r"data\.tokenizer\.path: there is no tokenizer file .*tokenizer\.json",
    ),
    "model's folder empty": (lambda f: {"model": {"load": _hollow(f)[5:]}}, r"model\.load.*hollow.*no model"),
    "model is a file": (lambda f: {"model": {"load": _empty(f)[5:]}}, r"model\.load: there is no folder .*empty\.txt"),
}


@pytest.mark.parametrize(("changes", "pattern"), FILES.values(), ids=list(FILES))
def test_missing_or_empty_file_is_named(tmp_path: Path, changes: Callable[[Path], dict[str, Any]], pattern: str) -> None:
    refused(tmp_path, altered(changes(tmp_path)), pattern)


def test_named_set_that_is_not_in_the_folder_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "sets" / "mnist").mkdir(parents=True)
    told = refused(tmp_path, altered({"data/source": "mnst"}), r"no set 'mnst'.*'mnist'", "--data-dir", str(tmp_path / "sets"))
    assert "train.parquet" in told


ARGUMENTS = {
    "set without an equals sign": (["--set", "stages.pretrain.steps"], r"--set takes path=value.*'stages\.pretrain\.steps'"),
    "set nothing": (["--set", "=3"], r"--set takes path=value"),
    "set through a scalar": (["--set", "model.stack.depth.x=3"], r"--set: .*'model\.stack\.depth'.*has no keys"),
    "set not YAML": (["--set", "data.source=[1"], r"--set data\.source: '\[1' is not YAML"),
    "set an unknown key": (["--set", "model.stack.dpeth=3"], r"model\.stack\.dpeth: unknown key.*'depth'"),
    "set an unknown section": (["--set", "modle.stack.depth=3"], r"modle: unknown key.*'model'"),
    "set a wrong type": (["--set", "model.stack.depth=deep"], r"model\.stack\.depth: .*'deep'"),
    "set inside an absent stage": (["--set", "stages.pertrain.steps=3"], r"stages\.pertrain: .*exactly one"),
    "set the part of a path": (["--set", "model..depth=3"], r"--set.*'model\.\.depth'"),
    "seeds of letters": (["--seeds", "a,b"], r"--seeds takes numbers.*'a,b'"),
    "seeds empty": (["--seeds", ""], r"--seeds takes numbers"),
    "seeds twice": (["--seeds", "1,1"], r"seeds are distinct"),
    "scale": (["--scale", "smal"], r"scale 'smal'.*'small'"),
    "variant": (["--variant", "defualt"], r"variant 'defualt'.*'default'"),
    "dtype": (["--dtype", "fp16"], r"--dtype is fp32 or bf16; got 'fp16'"),
    "no CUDA device": (["--device", "cuda:9"], r"--device cuda:9: .*CUDA devices"),
    "a device of another kind": (["--device", "meta"], r"--device meta: .*cpu, cuda"),
    "a device of no kind": (["--device", "gpu"], r"--device gpu: .*cpu, cuda"),
    "a device with nonsense": (["--device", "cpu:x"], r"--device cpu:x: "),
    "data folder missing": (["--set", "data.source=mnist", "--data-dir", "no/such"], r"no set 'mnist' in no/such"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "pattern"), ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_wrong_argument_is_refused_like_a_wrong_key(tmp_path: Path, arguments: list[str], pattern: str) -> None:
    refused(tmp_path, altered({}), pattern, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_refused_where_there_is_none(tmp_path: Path) -> None:
    refused(tmp_path, altered({}), r"--device cuda:0: this machine has 0 CUDA devices; use cpu", "--device", "cuda:0")


def test_output_folder_with_a_run_points_to_resume(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.yaml").write_text("name: other\n")
    refused(tmp_path, altered({}), r"run holds a run; go on with it by 'layerwise resume'")


def test_output_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    refused(tmp_path, altered({}), r"run holds files: choose a folder that is new or empty with --out")


def test_output_that_is_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    refused(tmp_path, altered({}), r"run (holds files|is a file)")


def test_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    refused(tmp_path, altered({}), r"file", out=tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["run", "no/such.yaml"], r"error: there is no file no/such\.yaml"),
        (["run", "mix-nl"], r"error: unknown system 'mix-nl'.*'mix-ln'"),
        (["run", "."], r"error: "),
        (["show", "mixln"], r"error: unknown system 'mixln'.*'mix-ln'"),
        (["show", "mix-ln", "--scale", "ful"], r"error: unknown scale 'ful'.*'full'"),
        (["resume", "no/such"], r"error: no/such holds no run"),
        (["report", "no/such"], r"error: no/such holds no run"),
        (["verify", "mix-nl"], r"error: .*'mix-nl'"),
        (["verify", "mix-ln", "--scale", "large"], r"error: .*large"),
        (["run", "demo", "--scale", "tiny"], r"error: .*no scale 'tiny'.*smoke"),
        (["inspect", "decodr"], r"error: unknown folder or preset 'decodr'.*'decoder'"),
        (["inspect", "no/such"], r"error: there is no folder no/such"),
        (["generate", "no/such", "a"], r"error: .*no/such"),
        (["convert", "no/such", "there"], r"error: there is no folder no/such"),
        (["convert", "no/such", "there", "--to", "gguf"], r"error: --to is hf, gptq or layerwise; got 'gguf'"),
        (["generate", "x", "a", "--path", "0,one"], r"error: --path takes numbers"),
        (["generate", "x", "a", "--top-p", "7"], r"top.p"),
        (["generate", "x", "a", "--new", "0"], r"--new"),
        (["inspect", "decoder", "--samples", "0"], r"samples"),
        (["inspect", "decoder", "--length", "0"], r"length"),
        (["run", "demo", "--sceal", "small"], r"No such option"),
        (["rnu", "demo"], r"No such command"),
        (["run"], r"Missing argument"),
    ],
)
def test_command_with_wrong_arguments_exits_with_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    assert re.search(pattern, result.stderr, re.DOTALL), result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir()), "something was written"


RICH: dict[str, Any] = {
    **BASE,
    "title": "t",
    "kinds": ["part"],
    "paper": {"title": "t", "year": 2000, "arxiv": "1", "authors": "a"},
    "claim": CLAIM | {"metric": "look.whole_loss"},
    "relations": [{"x": "a", "y": "b", "above": {"a": 1.0}}],
    "data": {**BASE["data"], "columns": {}, "augment": None, "documents": 9, "validation": 0.2, "seed": 1},
    "model": {
        "embedding": {"position": "learned", "max_length": 64, "types": 0, "norm": "layernorm"},
        "stack": {
            "depth": 4,
            "width": 16,
            "overrides": {"0:2": {"heads": 1, "linears": {"q": {"kind": "lora", "rank": 2}}}},
            "layer": {"heads": 2, "kv_heads": 1, "causal": True, "window": 4, "ffn": "swiglu", "placement": "deepnorm", "drop": 0.1},
        },
        "head": {"kind": "lm", "tie": True, "transform": "gelu"},
    },
    "stages": {
        "fit": {
            **BASE["stages"]["pretrain"],
            "optimizer": {"name": "sgd", "lr": 0.1, "depth_lr": {"0": 0.5}, "options": {"momentum": 0.9}},
            "schedule": {"name": "drops", "drops": {"0.5": 0.1}},
            "policies": [{"name": "freeze", "layers": [0], "head": True}, {"name": "layer-dropout", "rate": 0.1}],
        },
        "cut": {"edit": "drop-layers", "layers": [1]},
        "look": {"analyze": "block-sweep", "lengths": [1], "samples": 4},
        "say": {"generate": ["a"], "new": 3},
        "write": {"export": "layerwise", "dtype": "float32"},
    },
    "variants": {"a": {}, "b": {"model.stack.layer.placement": "post", "stages.cut": None}},
    "seeds": [0, 1],
    "scales": {"small": {"stages.fit.steps": 3}},
    "notes": ["n"],
}
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 10**30, 0.5, 1e300, "", "x", "../x", "a.b", "\x00", [], [[]], [None], [{}], ["x", 1], {}, {"x": 1}, {"": None}, {1: 2}, b"x",
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in inner for place in _places(child, (*path, key)))]


@pytest.mark.parametrize("odd", ODD, ids=lambda v: repr(v)[:20])
def test_no_odd_value_anywhere_gets_past_the_checks_as_another_error(odd: Any) -> None:
    from layerwise.errors import BadInput
    from layerwise.jobs.check import check_job
    from layerwise.jobs.schema import read_job

    check_job(read_job(copy.deepcopy(RICH)))
    for place in _places(RICH)[1:]:
        job = copy.deepcopy(RICH)
        *inner, last = place
        holder: Any = job
        for part in inner:
            holder = holder[part]
        holder[last] = odd
        try:
            check_job(read_job(job))
        except BadInput:
            continue
        except Exception as error:
            pytest.fail(f"{'.'.join(map(str, place))}: {odd!r} raises {type(error).__name__}: {error}")
