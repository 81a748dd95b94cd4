"""How fast a model decodes when its first layers draft: ours against ordinary decoding, and against transformers on the same weights.

    python benchmarks/self_speculation.py runs/exits/models/exits/seed-* [--exits 1,2] [--drafts 4,8] [--confidences 0,0.5] [--write]

The checkpoints are ours, trained with `early-exit-lm` on bytes, each with a seed of its own. They are exported and read by transformers, whose
`assistant_early_exit` drafts with the same layers, the same number of tokens at most and the same confidence, but runs the layers
below the exit anew when it checks. All decode greedily, one prompt at a time, in turns in one process, every text several times, of which the median
time counts. Settings are compared over all checkpoints; what is said of one has a number for each. `--write` keeps the result in
receipts/self-speculation.json.
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
    parser.add_argument("checkpoints", type=Path, nargs="+")
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
    settings = [
        (int(e), int(d), float(c)) for e in given.exits.split(",") for d in given.drafts.split(",") for c in given.confidences.split(",")
    ]
    data = load_data(DataSpec(source="builtin:code", length=given.prompt, tokenizer=TokenizerSpec("bytes")))
    prompts = data.validation.batch(torch.arange(given.prompts) * 97 % len(data.validation))["input_ids"].to(given.device)
    models = [layerwise.load(folder).to(given.device).eval() for folder in given.checkpoints]
    measured = [_measured(model, prompts, settings, given) for model in models]

    def ratio(above: Any, below: Any) -> list[float]:
        return [round(took[above] / took[below], 3) for took, _ in measured]

    lines = [
        {
            "exit": e,
            "draft": d,
            "confidence": c,
            "acceptance": [round(shares[e, d, c][0], 3) for _, shares in measured],
            "identical": [shares[e, d, c][1] for _, shares in measured],
            "speedup": ratio("plain", ("ours", e, d, c)),
            "transformers_speedup": ratio("transformers", ("theirs", e, d, c)),
            "over_transformers": ratio(("theirs", e, d, c), ("ours", e, d, c)),
        }
        for e, d, c in settings
    ]
    best, theirs = (min(settings, key=lambda s, who=who: sum(took[who, *s] for took, _ in measured)) for who in ("ours", "theirs"))
    result = {
        "best": best,
        "speedup": ratio("plain", ("ours", *best)),
        "best_transformers": theirs,
        "over_best_transformers": ratio(("theirs", *theirs), ("ours", *best)),
        "plain_over_transformers": ratio("transformers", "plain"),
        "tokens_per_second": [round(given.new * given.prompts / took["ours", *best], 1) for took, _ in measured],
        "settings": lines,
        "model": {
            "layers": models[0].stack.depth,
            "width": models[0].stack.spec.width,
            "parameters": sum(p.numel() for p in models[0].parameters()),
        },
        "measured": {name: getattr(given, name) for name in ("prompts", "prompt", "new", "repeats", "device", "clock")},
        "environment": {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()},
    }
    print(json.dumps(result, indent=2))
    if given.write:
        KEPT.write_text(json.dumps(result, indent=2) + "\n")


def _measured(
    model: Any, prompts: torch.Tensor, settings: list[Any], given: Any
) -> tuple[dict[Any, float], dict[Any, tuple[float, float]]]:
    """Seconds of every contestant for all prompts; for every setting, the share of drafts that stayed and of texts that are ordinary decoding's."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = AutoModelForCausalLM.from_pretrained(export_hf(model, Path(folder) / "hf")).to(given.device).eval()
    theirs.generation_config.eos_token_id = None
    hf = partial(theirs.generate, do_sample=False, max_new_tokens=given.new, pad_token_id=0)
    contestants: dict[Any, Any] = {"plain": partial(generate, model, new=given.new), "transformers": hf}
    for e, d, c in settings:
        contestants["ours", e, d, c] = partial(self_speculate, model, exit_layer=e, draft=d, confidence=c, new=given.new)
        contestants["theirs", e, d, c] = partial(_assisted, theirs, hf, e, d, c)
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    for call in contestants.values():  # what is slow once only
        call(prompts[:1])
    seconds: dict[Any, float] = dict.fromkeys(contestants, 0.0)
    accepted, drafted, same = (dict.fromkeys(settings, 0) for _ in range(3))
    for row in prompts.split(1):
        turns = [{name: _timed(call, row, clock) for name, call in contestants.items()} for _ in range(given.repeats)]
        for name in contestants:
            seconds[name] += median(turn[name][1] for turn in turns)
        for setting in settings:
            made = turns[0]["ours", *setting][0]
            accepted[setting] += made.accepted
            drafted[setting] += made.drafted
            same[setting] += torch.equal(made.ids, turns[0]["plain"][0])
    return seconds, {s: (accepted[s] / max(drafted[s], 1), same[s] / len(prompts)) for s in settings}


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
