"""How fast a model decodes when its first layers draft: ours against ordinary decoding, and against transformers on the same weights.

    python benchmarks/self_speculation.py runs/layerskip/models/layerskip/seed-0 [--exits 1,2,4] [--drafts 2,4,6]

The checkpoint is one of ours, trained with `early-exit-lm` on bytes. It is exported and read by transformers, whose
`assistant_early_exit` drafts with the same layers and the same number of tokens, but runs the layers below the exit anew when it
checks. All decode greedily, one prompt at a time, in turns in one process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import layerwise
from layerwise.data.load import load_data
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.infer.generate import generate
from layerwise.infer.speculative import self_speculate
from layerwise.models.hf import export_hf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--exits", default="1,2,4")
    parser.add_argument("--drafts", default="2,4,6")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    model = layerwise.load(given.checkpoint).to(given.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs = AutoModelForCausalLM.from_pretrained(export_hf(model, Path(folder) / "hf")).to(given.device).eval()
    theirs.generation_config.eos_token_id = None
    data = load_data(DataSpec(source="builtin:code", length=given.prompt, tokenizer=TokenizerSpec("bytes")))
    prompts = data.validation.batch(torch.arange(given.prompts) * 97 % len(data.validation))["input_ids"].to(given.device)

    hf = partial(theirs.generate, do_sample=False, max_new_tokens=given.new, pad_token_id=0)
    contestants = {"plain": partial(generate, model, new=given.new), "transformers": hf}
    for e in map(int, given.exits.split(",")):
        for d in map(int, given.drafts.split(",")):
            contestants[f"{e}/{d}"] = partial(self_speculate, model, exit_layer=e, draft=d, new=given.new)
            contestants[f"transformers {e}/{d}"] = partial(_assisted, theirs, hf, e, d)
    seconds: dict[str, float] = defaultdict(float)
    texts: dict[str, list[list[int]]] = defaultdict(list)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in [prompts[:1], *prompts.split(1)]:
        for name, call in contestants.items():
            began = time.perf_counter()
            made = call(row)
            if row.is_cuda:
                torch.cuda.synchronize()
            spent = time.perf_counter() - began
            if len(texts[name]) < 1:  # the first prompt is there to warm up, and comes again
                texts[name].append([])
                continue
            seconds[name] += spent
            texts[name].append((made if isinstance(made, torch.Tensor) else made.ids)[0].tolist())
            if not isinstance(made, torch.Tensor):
                counts[name] = [counts[name][0] + made.accepted, counts[name][1] + made.drafted]
    pairs = [name for name in seconds if "/" in name and " " not in name]
    best = min(pairs, key=seconds.__getitem__)
    best_theirs = min((f"transformers {p}" for p in pairs), key=seconds.__getitem__)
    lines = {
        p: {
            "acceptance": round(counts[p][0] / max(counts[p][1], 1), 3),
            "speedup": round(seconds["plain"] / seconds[p], 3),
            "transformers_speedup": round(seconds["transformers"] / seconds[f"transformers {p}"], 3),
            "over_transformers": round(seconds[f"transformers {p}"] / seconds[p], 3),
            "identical": texts[p] == texts["plain"],
        }
        for p in pairs
    }
    summary = {"best": best, "speedup": lines[best]["speedup"], "over_best_transformers": round(seconds[best_theirs] / seconds[best], 3)}
    summary |= {"best_transformers": best_theirs, "plain_over_transformers": round(seconds["transformers"] / seconds["plain"], 3)}
    print(json.dumps({"exit/draft": lines, **summary}, indent=2))


def _assisted(model: torch.nn.Module, call: partial, exit_layer: int, draft: int, ids: torch.Tensor) -> torch.Tensor:
    settings = model.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule, settings.assistant_confidence_threshold = draft, "constant", 0.0
    return call(ids, assistant_early_exit=exit_layer)


if __name__ == "__main__":
    main()
