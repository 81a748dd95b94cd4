"""What analyses and evaluations refuse because of a model's description or their options, the job check refuses before anything runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from layerwise import analyze, evaluate
from layerwise.errors import BadInput
from layerwise.jobs.check import CHECKS, check_job
from layerwise.jobs.schema import read_job
from layerwise.table import lookup

LAYERS = {"depth": 2, "width": 16, "layer": {"heads": 2}}
MODELS: dict[str, dict[str, Any]] = {
    "decoder": {"data": {"source": "builtin:docs", "length": 32, "tokenizer": {"kind": "bytes"}}, "model": {"preset": "decoder", "stack": LAYERS}},
    "encoder": {"data": {"source": "builtin:docs", "length": 32, "tokenizer": {"kind": "bytes"}}, "model": {"preset": "encoder", "stack": LAYERS}},
    "pairs": {
        "data": {"source": "builtin:summaries", "pairs": {"say": ["signature", "summary"]}, "length": 64, "tokenizer": {"kind": "bytes"}},
        "model": {"preset": "decoder", "stack": LAYERS},
    },
    "vit": {"data": {"source": "builtin:digits"}, "model": {"preset": "vit", "stack": LAYERS}},
    "mlp": {"data": {"source": "builtin:digits"}, "model": {"preset": "mlp"}},
    "ghn": {
        "data": {"source": "builtin:digits"},
        "model": {
            "embedding": {"kind": "graph", "channels": 1, "size": [8, 8]},
            "stack": {**LAYERS, "layer": {"heads": 2, "position": "graph"}},
            "head": {"kind": "parameters", "classes": 10},
        },
    },
}  # fmt: skip
ROUTED = {"route": {"edit": "route-tokens"}}
SHRUNK = {"shrink": {"edit": "shrink-cache", "key_share": 0.5}}
SMALLER = {"cut": {"edit": "drop-layers", "count": 1}}

REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "thin features": ("decoder", {}, {"analyze": "cache-errors"}, r"keeps thin features.*shrink-cache"),
    "thin features to train": ("decoder", {}, {"train": "cache-reconstruction", "steps": 1}, r"keeps thin features.*shrink-cache"),
    "keys and values": ("mlp", {}, {"analyze": "cache-spectrum"}, r"needs layers of kind attention"),
    "maps of attention": ("mlp", {}, {"analyze": "attention-entropy"}, r"needs layers of kind attention"),
    "a stream": ("mlp", {}, {"analyze": "stream-variance"}, r"stream of transformer layers"),
    "blocks too long": ("decoder", {}, {"analyze": "block-sweep", "lengths": [1, 2]}, r"block of 2 layers.*stack of 2"),
    "blocks of a cut stack": ("decoder", SMALLER, {"analyze": "block-sweep", "lengths": [1]}, r"block of 1 layers.*stack of 1"),
    "no blocks": ("decoder", {}, {"analyze": "block-sweep", "lengths": []}, r"lengths names no block"),
    "a block too long": ("decoder", {}, {"analyze": "block-drop", "count": 3}, r"cannot drop 3 layers of a stack of 2"),
    "a block by a rule": ("decoder", {}, {"analyze": "block-drop", "count": 2, "rule": "deepest"}, r"keeps the last layer"),
    "lowered too many": ("decoder", {}, {"analyze": "bits-curve", "lowered": [0, 3]}, r"lowered counts layers of a stack of 2; got 3"),
    "lowered none": ("decoder", {}, {"analyze": "bits-curve", "lowered": []}, r"lowered names no number"),
    "bits of a curve": ("decoder", {}, {"analyze": "bits-curve", "bits": 99}, r"99"),
    "a curve of an encoder": ("encoder", {}, {"analyze": "bits-curve"}, r"bits-curve needs causal layers"),
    "quantized images": ("mlp", {}, {"analyze": "quantization-error"}, r"transformer layers"),
    "bits of errors": ("decoder", {}, {"analyze": "quantization-error", "bits": [4]}, r"bits"),
    "groups of images": ("mlp", {}, {"analyze": "group-importance", "by": "magnitude"}, r"head groups.*transformer layers"),
    "groups by bits": ("decoder", {}, {"analyze": "group-importance", "by": "quantization-error", "bits": 99}, r"quantized to .* got 99"),
    "groups by an unknown score": ("decoder", {}, {"analyze": "group-importance", "by": "size"}, r"group-importance\.by.*'size'"),
    "importance by bits": ("decoder", {}, {"analyze": "layer-importance", "bits": 99}, r"quantized to .* got 99"),
    "an unknown objective": ("decoder", {}, {"analyze": "layer-importance", "objective": "causal"}, r"unknown objective 'causal'"),
    "an objective with a teacher": ("decoder", {}, {"analyze": "gradient-norms", "objective": "distillation"}, r"options\.teacher"),
    "an objective of routers": ("decoder", {}, {"analyze": "gradient-norms", "objective": "token-router-lm"}, r"routers of tokens"),
    "widths of images": ("mlp", {}, {"analyze": "layer-widths"}, r"compares transformer layers"),
    "widths of another depth": (
        "decoder",
        {"fit": {"train": "causal-lm", "steps": 1}, **SMALLER},
        {"analyze": "layer-widths", "of": "stage:fit"},
        r"compares transformer layers, as many in both",
    ),
    "weights cut to more": ("decoder", {}, {"analyze": "weight-sizes", "ratio": 0.5}, r"ratio.*at least 1; it is 0\.5"),
    "routers": ("decoder", {}, {"evaluate": "token-routing"}, r"routers of tokens"),
    "a share of all": ("decoder", ROUTED, {"evaluate": "token-routing", "active": "all", "share": 0.5}, r"active: all has none"),
    "random without share": ("decoder", ROUTED, {"evaluate": "token-routing", "active": "random"}, r"random choices need a share"),
    "a share calibrated": ("decoder", ROUTED, {"evaluate": "token-routing", "calibrate": "layer", "share": 0.5}, r"leave share out"),
    "a share above one": ("decoder", ROUTED, {"evaluate": "token-routing", "share": 1.5}, r"between 0 and 1; it is 1\.5"),
    "an exit too high": ("decoder", {}, {"evaluate": "early-exits", "at": 3}, r"1 to 2; it is 3"),
    "a draft's exit": ("decoder", {}, {"evaluate": "self-speculation", "exits": [1, 4]}, r"exit_layer is 1 to 2.*got 4"),
    "a negative draft": ("decoder", {}, {"evaluate": "self-speculation", "exits": [1], "drafts": [2, -1]}, r"draft >= 0; got 1 and -1"),
    "no drafts": ("decoder", {}, {"evaluate": "self-speculation", "exits": [1], "drafts": []}, r"at least one entry"),
    "no repeats": ("decoder", {}, {"evaluate": "self-speculation", "exits": [1], "repeats": 0}, r"repeats is at least 1"),
    "confidence": ("decoder", {}, {"evaluate": "self-speculation", "exits": [1], "confidence": 2.0}, r"confidence is a probability"),
    "drafts with a compressed cache": (
        "decoder",
        {"evict": {"edit": "evict-cache", "kind": "recent", "window": 8, "sinks": 2, "heavy": 1}},
        {"evaluate": "self-speculation", "exits": [1]},
        r"steps back, which a compressed cache cannot",
    ),
    "skipping without routers": ("pairs", {}, {"evaluate": "continuation", "skip": 0.5}, r"skip needs a model with routers"),
    "a path": ("decoder", {}, {"evaluate": "language-modeling", "path": [0, 2]}, r"names layer 2; the stack has layers 0 to 1"),
    "nothing masked": ("encoder", {}, {"evaluate": "masked-lm", "rate": 0.0}, r"share of tokens to predict.*it is 0"),
    "no simulations": ("vit", {}, {"evaluate": "chain-search", "simulations": 0}, r"at least 1; got 0 and 100"),
    "no questions": ("vit", {}, {"evaluate": "chain-search", "questions": 0}, r"at least 1; got 200 and 0"),
    "a search's numbers": ("vit", {}, {"evaluate": "chain-search", "explore": 2.0}, r"explore is a probability"),
    "chains of other layers": ("mlp", {}, {"evaluate": "chain-search"}, r"skips and repeats layers.*transformer layers"),
    "a probe too high": ("vit", {}, {"evaluate": "linear-probe", "layers": [0, 2]}, r"cannot probe layer 2"),
    "a probe of nothing": ("vit", {}, {"evaluate": "linear-probe", "layers": []}, r"layers names none"),
    "a probe without filters": ("vit", {}, {"evaluate": "linear-probe", "layers": [0], "filtered": True}, r"add-filters"),
    "turned text": ("decoder", {}, {"evaluate": "linear-probe", "target": "quarters"}, r"images that are turned"),
    "labels of text": ("decoder", {}, {"evaluate": "linear-probe"}, r"linear-probe needs data with labels; builtin:docs has none"),
    "questions nowhere": ("decoder", {}, {"evaluate": "multiple-choice", "file": "nowhere.jsonl"}, r"nowhere\.jsonl cannot be read"),
    "questions to an encoder": ("encoder", {}, {"evaluate": "multiple-choice", "file": "nowhere.jsonl"}, r"needs causal layers"),
    "no weights": ("mlp", {"fit": {"train": "classification", "steps": 1}}, {"evaluate": "fusion-curve", "other": "stage:fit", "weights": []}, r"at least one"),
    "weights": ("mlp", {"fit": {"train": "classification", "steps": 1}}, {"evaluate": "fusion-curve", "other": "stage:fit", "weights": [2.0]}, r"lie in \[0, 1\]"),
    "other layers": ("vit", {"fit": {"train": "classification", "steps": 1}}, {"evaluate": "fusion-curve", "other": "stage:fit"}, r"dense and convolutional"),
    "other widths": (
        "mlp",
        {"fit": {"train": "classification", "steps": 1}, "thin": {"edit": "initialize", "stack": {"layers": [{"kind": "dense", "channels": 8}]}}},
        {"evaluate": "fusion-curve", "other": "stage:fit", "match": "none"},
        r"and 8 here: match: none needs equal ones",
    ),
    "rates": ("ghn", {}, {"evaluate": "ghn-start", "rates": [0.1, -1.0]}, r"positive learning rates"),
    "no networks": ("ghn", {}, {"evaluate": "ghn-start", "nets": 0}, r"nets is at least 1"),
    "votes of a language model": ("decoder", {"fit": {"train": "causal-lm", "steps": 1}}, {"evaluate": "ensemble-accuracy", "other": "stage:fit"}, r"kind classifier"),
}  # fmt: skip


def _checked(base: str, before: dict[str, Any], stage: dict[str, Any]) -> None:
    check_job(read_job({"name": "tiny", **MODELS[base], "stages": {**before, "look": stage}}))


@pytest.mark.parametrize(("base", "before", "stage", "message"), REFUSED.values(), ids=list(REFUSED))
def test_stage_is_refused_by_name_before_anything_runs(base: str, before: dict[str, Any], stage: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=r"^stages\.look: ") as refused:
        _checked(base, before, stage)
    assert re.search(message, str(refused.value), re.DOTALL), refused.value


@pytest.mark.parametrize(
    ("base", "before", "stage"),
    [
        ("decoder", SHRUNK, {"analyze": "cache-errors"}),
        ("decoder", SHRUNK, {"train": "cache-reconstruction", "steps": 1, "optimizer": {"lr": 1e-3}}),
        ("decoder", {}, {"analyze": "cache-spectrum"}),
        ("vit", {}, {"analyze": "stream-variance"}),
        ("pairs", {}, {"evaluate": "continuation"}),
        ("decoder", {}, {"analyze": "block-sweep", "lengths": [1]}),
        ("decoder", {}, {"analyze": "bits-curve", "lowered": [0, 2]}),
        ("decoder", ROUTED, {"evaluate": "token-routing", "active": "random", "share": 0.5}),
        ("decoder", {}, {"evaluate": "self-speculation", "exits": [1, 2], "drafts": [0, 2]}),
        ("decoder", {}, {"evaluate": "language-modeling", "path": [1, 0, 1]}),
        ("vit", {}, {"evaluate": "linear-probe", "layers": [-2, 1], "target": "quarters"}),
        ("vit", {}, {"evaluate": "chain-search"}),
        ("ghn", {}, {"evaluate": "ghn-start"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_stage_that_can_run_passes(base: str, before: dict[str, Any], stage: dict[str, Any]) -> None:
    # The cases above are refused for what they say, not for the model below them.
    _checked(base, before, stage)


def test_questions_are_read_before_training(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n')
    _checked("decoder", {}, {"evaluate": "multiple-choice", "file": str(file)})
    file.write_text('{"context": "a", "choices": ["b", "c"], "answer": 2}\n')
    with pytest.raises(BadInput, match="line 1"):
        _checked("decoder", {}, {"evaluate": "multiple-choice", "file": str(file)})


def test_every_check_belongs_to_an_entry_and_takes_its_options() -> None:
    entries = analyze.ANALYSES | evaluate.EVALUATIONS
    assert set(CHECKS) <= set(entries)
    assert len(CHECKS) == len(analyze.CHECKS) + len(evaluate.CHECKS)
    for name in CHECKS:
        options = inspect.signature(lookup(entries, name, "entry")).parameters
        check = inspect.signature(lookup(CHECKS, name, "check")).parameters.values()
        assert all(p.name in options for p in check if p.kind is p.KEYWORD_ONLY and p.default is p.empty), name
        assert any(p.kind is p.VAR_KEYWORD for p in check), name
