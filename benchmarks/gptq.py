"""Time and memory of calibration and GPTQ to 4 bits: ours beside gptqmodel and llm-compressor, on one checkpoint and the same rows.

    python -m venv /tmp/gptqmodel; /tmp/gptqmodel/bin/pip install torch==2.13.0 gptqmodel
    python -m venv /tmp/llmcompressor; /tmp/llmcompressor/bin/pip install torch==2.13.0 llmcompressor
    python benchmarks/gptq.py --gptqmodel /tmp/gptqmodel/bin/python --llmcompressor /tmp/llmcompressor/bin/python

They want other versions of libraries than we do, so each lives in an environment of its own, and every contestant runs in a process
of its own, in turns. The model is a Llama with drawn weights; groups of 128, symmetric, no act-order, damping 0.01. What is measured begins when
the model is loaded and ends when its matrices are rounded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

GROUP, BATCH = 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gptqmodel", help="a Python that has it")
    parser.add_argument("--llmcompressor", help="a Python that has it")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.contestant:
        print(json.dumps(measure(given.contestant, given.folder)))
        return
    pythons = {"ours": sys.executable, "gptqmodel": given.gptqmodel, "llmcompressor": given.llmcompressor}
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), given)
        for _ in range(given.rounds):
            for name, python in pythons.items():
                if python is None:
                    continue
                command = [python, str(Path(__file__).resolve()), "--contestant", name, "--folder", folder]
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2"})
                if done.returncode:
                    raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
                found[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    least = {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    summary: dict[str, Any] = {"contestants": least}
    for name in found.keys() - {"ours"}:
        summary[f"{name}_over_ours"] = {
            key: round(least[name][key] / least["ours"][key], 2) for key in ("cpu_seconds", "seconds", "peak_bytes", "error")
        }
    print(json.dumps(summary, indent=2))


def prepare(folder: Path, given: argparse.Namespace) -> None:
    """A checkpoint with drawn weights and a tokenizer of its own, and rows of tokens, that all read."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=given.width, intermediate_size=3 * given.width, num_hidden_layers=given.depth,
        num_attention_heads=given.width // 64, num_key_value_heads=given.width // 64, max_position_embeddings=2048, initializer_range=0.04,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 1024)}}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )
    fast.save_pretrained(folder / "model")
    # Tokens that are not equally frequent, so that inputs are correlated.
    frequency = 1 / torch.arange(1, 1022).float()
    save_file(
        {"ids": 3 + torch.multinomial(frequency, (given.rows + 4) * given.length, replacement=True).view(-1, given.length)},
        folder / "rows.safetensors",
    )


def measure(name: str, folder: Path) -> dict[str, float]:
    """One contestant's numbers: wall and processor seconds, bytes above those of the loaded model, and what is left of the logits."""
    from safetensors.torch import load_file

    ids = load_file(folder / "rows.safetensors")["ids"]
    held = ids[-4:]
    load, work, logits = {"ours": _ours, "gptqmodel": _gptqmodel, "llmcompressor": _llmcompressor}[name](folder, ids[:-4])
    model = load()
    before, wall, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter(), time.process_time()
    made = work(model)
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        true = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()(held).logits
        error = ((logits(made, held).float() - true).square().mean() / true.square().mean()).item()
    return {**{key: round(value, 3) for key, value in spent.items()}, "peak_bytes": peak, "error": round(error, 6)}


def _ours(folder: Path, ids: torch.Tensor) -> tuple[Any, Any, Any]:
    import layerwise

    class Rows:
        def __len__(self) -> int:
            return len(ids)

        def batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"input_ids": ids[rows]}

    class Data:
        train = Rows()

    return (
        lambda: layerwise.load(folder / "model"),
        lambda model: layerwise.edit.quantize(model, Data(), bits=4, group=GROUP, symmetric=True, samples=len(ids), batch=BATCH),
        lambda model, held: model({"input_ids": held}).logits,
    )


def _gptqmodel(folder: Path, ids: torch.Tensor) -> tuple[Any, Any, Any]:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    settings = QuantizeConfig(
        bits=4, group_size=GROUP, sym=True, desc_act=False, act_group_aware=False, damp_percent=0.01, offload_to_disk=False, device="cpu"
    )
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]

    def work(model: Any) -> Any:
        model.quantize(rows, batch_size=BATCH)
        return model

    def logits(model: Any, held: torch.Tensor) -> torch.Tensor:
        model.save(str(folder / "gptqmodel"))
        back = GPTQModel.load(str(folder / "gptqmodel"), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        return back.model(held).logits

    return lambda: GPTQModel.load(str(folder / "model"), settings), work, logits


def _llmcompressor(folder: Path, ids: torch.Tensor) -> tuple[Any, Any, Any]:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoTokenizer, LlamaForCausalLM

    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"], dampening_frac=0.01)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    def work(model: Any) -> Any:
        oneshot(
            model=model, tokenizer=tokenizer, dataset=rows, recipe=recipe, max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
            batch_size=BATCH,
        )  # fmt: skip
        return model

    return lambda: LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), work, lambda model, held: model(held).logits


if __name__ == "__main__":
    main()
