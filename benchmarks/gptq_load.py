"""What transformers makes of a checkpoint in the GPTQ format that we exported: its logits against those of our model.

    python -m venv /tmp/gptqmodel; /tmp/gptqmodel/bin/pip install torch==2.13.0 transformers==5.24.0 optimum gptqmodel; /tmp/gptqmodel/bin/pip install .
    /tmp/gptqmodel/bin/python benchmarks/gptq_load.py [--kernel auto]

A small random decoder is quantized, exported, and loaded by `AutoModelForCausalLM.from_pretrained`. Its kernels multiply by float16 matrices, so
it is compared with our packed model and with ours multiplied out (edit: merge) and rounded to float16.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import layerwise as lw
from layerwise.data.load import load_data
from layerwise.data.spec import DataSpec, TokenizerSpec

SETTINGS: list[dict[str, Any]] = [
    {"bits": 8, "group": None, "symmetric": True},
    {"bits": 4, "group": 32},
    {"bits": 4, "group": 64, "symmetric": True},
    {"bits": 4, "group": 32, "symmetric": True, "act_order": True},
    {"bits": 3, "group": 32},
    {"bits": 2, "group": 32},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="torch", help="of gptqmodel; auto: what it takes by itself")
    given = parser.parse_args()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    rows = load_data(DataSpec(source="builtin:code", length=32, tokenizer=TokenizerSpec("bytes")))
    print(json.dumps({name: version(name) for name in ("torch", "transformers", "optimum", "gptqmodel")}))
    for setting in SETTINGS:
        print(json.dumps(setting | compared(rows, setting, given.kernel)))


@torch.no_grad()
def compared(rows: Any, setting: dict[str, Any], kernel: str) -> dict[str, Any]:
    """The largest differences of logits, and the largest logit."""
    from transformers import AutoModelForCausalLM, GPTQConfig

    stack = {"depth": 2, "width": 128, "init_std": 0.1, "layer": {"heads": 2, "ffn_width": 256}}
    packed = lw.edit.quantize(lw.load("decoder", embedding={"vocab": rows.vocab}, stack=stack).eval(), rows, samples=4, **setting)
    ids = torch.arange(24).view(2, 12) * 7 % 256
    chosen = {} if kernel == "auto" else {"quantization_config": GPTQConfig(bits=setting["bits"], backend=kernel)}
    with tempfile.TemporaryDirectory() as folder:
        lw.export(packed, Path(folder) / "gptq", format="gptq")
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "gptq", device_map="cpu", dtype=torch.float32, **chosen).eval()
    logits, ours = theirs(ids).logits, packed({"input_ids": ids}).logits
    rounded = lw.edit.merge(packed)
    for name, parameter in rounded.named_parameters():
        if name.startswith("stack.layers.") and parameter.dim() == 2:
            parameter.copy_(parameter.half())
    return {
        "kernel": type(theirs.model.layers[0].self_attn.q_proj).__name__,
        "from_packed": (logits - ours).abs().max().item(),
        "from_rounded": (logits - rounded({"input_ids": ids}).logits).abs().max().item(),
        "largest": ours.abs().max().item(),
    }


if __name__ == "__main__":
    main()
