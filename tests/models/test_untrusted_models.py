"""Model folders from strangers: whatever stands in a config.json or a model.json, the answer is a description or one message, soon.

`LAYERWISE_FUZZ=500` makes the searches that long; the usual tests take a few seconds.
"""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from layerwise.errors import BadInput
from layerwise.files import CHECKSUMS, sha256, write_json
from layerwise.models.checkpoint import load
from layerwise.models.hf import FAMILIES, import_hf
from layerwise.models.load import described
from layerwise.models.presets import PRESETS, preset
from layerwise.models.room import check_model, closed
from layerwise.models.spec import model_spec, spec_data
from layerwise.table import lookup

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from hf_parity import CASES

fuzz = settings(
    max_examples=int(os.environ.get("LAYERWISE_FUZZ", "5")),
    deadline=None,
    derandomize="LAYERWISE_FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SECONDS = 20.0
"""No answer takes longer; most take a hundredth."""
CONFIGS = {}
for case in CASES:
    CONFIGS.setdefault(case.family, []).append({**case.config.to_dict(), "architectures": [case.make.__name__]})

WORDS = [
    "",
    "x",
    "gelu",
    "relu",
    "silu",
    "sum",
    "../x",
    "\x00",
    "full_attention",
    "absolute",
    "float16",
    "group",
    "layer",
    "bottleneck",
    "None",
]
NUMBERS = [-(2**63), -1, 0, 1, 2, 3, 7, 33, 1000, 10_000, 10**6, 10**9, 2**31, 2**63, 10**30, 10**400]
PLAIN = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(-3, 80), st.floats(), st.sampled_from(WORDS), st.text(max_size=5),
)  # fmt: skip
ANY = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def _places(value, path=()):
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(place for key, child in inner for place in _places(child, (*path, key)))]


def _mutated(data, value):
    """`value` with one to three of its parts replaced, taken out, or put where another one is."""
    value = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 3))):
        places = _places(value)
        *inner, last = data.draw(st.sampled_from(places))
        holder = value
        for key in inner:
            holder = holder[key]
        if isinstance(holder, dict) and data.draw(st.integers(0, 5)) == 0:
            del holder[last]
        else:
            holder[last] = data.draw(ANY)
        if not _places(value):
            break
    return value


def _told(read):
    """Whether reading gives a result; True or one message, in time."""
    began = time.monotonic()
    try:
        read()
        return True
    except BadInput as error:
        assert str(error) and "Traceback" not in str(error)
        return False
    finally:
        assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("family", FAMILIES)
@fuzz
@given(data=st.data())
def test_configs_of_every_family(family, tmp_path, data):
    """Without its tensors: the description, whether its parameters fit, and the import, which then misses the tensors."""
    config = _mutated(data, data.draw(st.sampled_from(CONFIGS[family])))
    (tmp_path / "config.json").write_text(json.dumps(config))
    if _told(lambda: described(tmp_path)):
        _told(lambda: check_model(described(tmp_path), 1))
    assert not _told(lambda: import_hf(tmp_path))


def _descriptions():
    found = {name: spec_data(closed(model_spec(preset(name)))) for name in PRESETS}
    for family in ("clip", "t5", "whisper", "bit", "albert", "beit"):
        read = lookup(FAMILIES, family, "family").read
        found[family] = spec_data(read(json.loads(json.dumps(CONFIGS[family][0])), True))
    return json.loads(json.dumps(found))


SPECS = _descriptions()


@pytest.mark.parametrize("name", SPECS)
@fuzz
@given(data=st.data())
def test_descriptions_of_every_kind_of_model(name, tmp_path, data):
    """Our own model.json, its checksums made to fit, beside tensors that do not."""
    model = _mutated(data, {"format": 1, "spec": SPECS[name], "shared": {}})
    (tmp_path / "model.json").write_text(json.dumps(model))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    write_json(tmp_path / CHECKSUMS, {n: sha256(tmp_path / n) for n in ("model.json", "model.safetensors")})
    if _told(lambda: described(tmp_path)):
        _told(lambda: check_model(described(tmp_path), 1))
    assert not _told(lambda: load(tmp_path))
