"""Loading holds the weights of a model once."""

from pathlib import Path

import pytest
import torch

from layerwise.models.checkpoint import load, save
from layerwise.models.hf.folder import export_hf, import_hf
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec


def _spec(**stack: object):
    described = preset("decoder")
    described["stack"] |= {"depth": 4, "width": 32, **stack}
    described["stack"]["layer"] |= {"heads": 2}
    described["embedding"] = {"vocab": 64}
    return model_spec(described)


def _anonymous() -> int:
    """Bytes of memory of this process that are not a file's."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize(("write", "read"), [(save, load), (export_hf, import_hf)])
def test_loading_takes_no_copy_of_the_file_and_converting_one_of_the_result(tmp_path: Path, write, read):
    model = build(_spec(width=512))
    size = sum(p.numel() * 4 for p in model.parameters())
    write(model, tmp_path / "kept")
    read(tmp_path / "kept")  # what is imported on the way
    before = _anonymous()
    again = read(tmp_path / "kept")
    assert _anonymous() - before < 0.2 * size, "the weights stay in the file until they are changed"
    low = read(tmp_path / "kept", dtype=torch.bfloat16)
    assert _anonymous() - before < 0.75 * size
    for (name, a), b in zip(model.state_dict().items(), low.state_dict().values(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b), name
    assert again.spec == low.spec
