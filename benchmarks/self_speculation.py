"""How fast a model decodes when its first layers draft: ours against ordinary decoding, and against transformers on the same weights.

    python benchmarks/self_speculation.py runs/layerskip/models/layerskip/seed-0 [--exits 1,2] [--drafts 4,8] [--confidences 0,0.5] [--write]

The checkpoint is one of ours, trained with `early-exit-lm` on bytes. It is exported and read by transformers, whose
`assistant_early_exit` drafts with the same layers, the same number of tokens at most and the same confidence, but runs the layers
below the exit anew when it checks. All decode greedily, one prompt at a time, in turns in one process, every text several times, of which the median
time counts. `--write` keeps the result in receipts/self-speculation.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

import layerwise
from layerwise.data.load import load_data
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.infer.generate import generate
from layerwise.infer.speculative import self_speculate
from layerwise.models.hf import export_hf

KEPT = Path(__file__).resolve().parents[1] / "receipts" / "self-speculation.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--exits", default="1,2")
    parser.add_argument("--drafts", default="4,8")
    parser.add_argument("--confidences", default="0,0.5")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: seconds of this process, for a busy machine")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    model = layerwise.load(given.checkpoint).to(given.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs = AutoModelForCausalLM.from_pretrained(export_hf(model, Path(folder) / "hf")).to(given.device).eval()
    theirs.generation_config.eos_token_id = None
    data = load_data(DataSpec(source="builtin:code", length=given.prompt, tokenizer=TokenizerSpec("bytes")))
    prompts = data.validation.batch(torch.arange(given.prompts) * 97 % len(data.validation))["input_ids"].to(given.device)

    hf = partial(theirs.generate, do_sample=False, max_new_tokens=given.new, pad_token_id=0)
    settings = [
        (int(e), int(d), float(c)) for e in given.exits.split(",") for d in given.drafts.split(",") for c in given.confidences.split(",")
    ]
    contestants: dict[Any, Any] = {"plain": partial(generate, model, new=given.new), "transformers": hf}
    for e, d, c in settings:
        contestants["ours", e, d, c] = partial(self_speculate, model, exit_layer=e, draft=d, confidence=c, new=given.new)
        contestants["theirs", e, d, c] = partial(_assisted, theirs, hf, e, d, c)
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    for call in contestants.values():  # what is slow once only
        call(prompts[:1])
    seconds: dict[Any, list[float]] = {name: [] for name in contestants}
    texts: dict[Any, list[list[int]]] = {name: [] for name in contestants}
    accepted, drafted = dict.fromkeys(settings, 0), dict.fromkeys(settings, 0)
    for row in prompts.split(1):
        turns = [{name: _timed(call, row, clock) for name, call in contestants.items()} for _ in range(given.repeats)]
        for name in contestants:
            seconds[name].append(median(turn[name][1] for turn in turns))
            made = turns[0][name][0]
            texts[name].append((made if isinstance(made, torch.Tensor) else made.ids)[0].tolist())
            if not isinstance(made, torch.Tensor):
                accepted[name[1:]] += made.accepted
                drafted[name[1:]] += made.drafted
    took = {name: sum(each) for name, each in seconds.items()}
    lines = [
        {
            "exit": e,
            "draft": d,
            "confidence": c,
            "acceptance": round(accepted[e, d, c] / max(drafted[e, d, c], 1), 3),
            "speedup": round(took["plain"] / took["ours", e, d, c], 3),
            "transformers_speedup": round(took["transformers"] / took["theirs", e, d, c], 3),
            "over_transformers": round(took["theirs", e, d, c] / took["ours", e, d, c], 3),
            "identical": texts["ours", e, d, c] == texts["plain"],
        }
        for e, d, c in settings
    ]
    best, best_theirs = (min(settings, key=lambda s, who=who: took[who, *s]) for who in ("ours", "theirs"))
    result = {
        "best": best,
        "speedup": round(took["plain"] / took["ours", *best], 3),
        "best_transformers": best_theirs,
        "over_best_transformers": round(took["theirs", *best_theirs] / took["ours", *best], 3),
        "plain_over_transformers": round(took["transformers"] / took["plain"], 3),
        "tokens_per_second": round(given.new * given.prompts / took["ours", *best], 1),
        "settings": lines,
        "model": {"layers": model.stack.depth, "width": model.stack.spec.width, "parameters": sum(p.numel() for p in model.parameters())},
        "measured": {name: getattr(given, name) for name in ("prompts", "prompt", "new", "repeats", "device", "clock")},
        "environment": {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()},
    }
    print(json.dumps(result, indent=2))
    if given.write:
        KEPT.write_text(json.dumps(result, indent=2) + "\n")


def _timed(call: Any, row: torch.Tensor, clock: Any) -> tuple[Any, float]:
    began = clock()
    made = call(row)
    if row.is_cuda:
        torch.cuda.synchronize()
    return made, clock() - began


def _assisted(model: Any, call: partial, exit_layer: int, draft: int, confidence: float, ids: torch.Tensor) -> torch.Tensor:
    settings = model.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = draft, "constant"
    settings.assistant_confidence_threshold = confidence
    return call(ids, assistant_early_exit=exit_layer)


if __name__ == "__main__":
    main()
