"""A vision transformer trained, shortened and exported by a job."""

from pathlib import Path

import torch
import transformers as T

import layerwise as lw

JOB = {
    "name": "small-vit",
    "data": {"source": "builtin:digits"},
    "model": {
        "preset": "vit",
        "embedding": {"patch": [2, 2]},
        "stack": {"depth": 3, "width": 32},
    },
    "stages": {
        "fit": {"train": "classification", "steps": 30, "batch": 64, "optimizer": {"lr": 3.0e-3}},
        "cut": {"edit": "drop-layers", "layers": [1]},
        "write": {"export": "hf"},
    },
    "seeds": [0],
}


def test_a_vit_learns_digits_and_goes_out_as_one(tmp_path: Path) -> None:
    lw.run(JOB, out=tmp_path / "run")
    folder = next((tmp_path / "run" / "exports").rglob("config.json")).parent
    loaded = T.ViTForImageClassification.from_pretrained(folder).eval()
    assert loaded.config.num_hidden_layers == 2 and loaded.config.num_labels == 10 and loaded.config.num_channels == 1
    pixels = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        ours = lw.load(folder)({"pixel_values": pixels}).logits
        torch.testing.assert_close(loaded(pixels).logits, ours, rtol=0, atol=1e-5)
