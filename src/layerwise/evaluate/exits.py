"""Leaving a language model early: what every depth predicts, and what that is worth in self-speculative decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from layerwise.analyze.findings import Findings, Table
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.infer.generate import generate
from layerwise.infer.speculative import check_drafting, self_speculate
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.objectives.early_exit import normed
from layerwise.objectives.language import next_tokens, score_labels


def early_exits(
    model: Model, data: Any, *, at: int | None = None, split: str = "validation", batch: int = 16, batches_at_most: int | None = None
) -> Findings:
    """Next-token loss (nats) after every layer, through the final norm and the head.

    Metrics: `exit_loss` after the first `at` layers (None: half of them), `val_loss` after all, `exit_gap` their ratio - 1.
    """
    check_exits(model.spec, at=at)
    depth = model.stack.depth
    at = max(depth // 2, 1) if at is None else at
    total = torch.zeros(depth, dtype=torch.float64, device=model.device)
    count = torch.zeros((), dtype=torch.long, device=model.device)
    with inference(model):
        for rows in batches(split_of(data, split), batch, batches_at_most, model.device):
            target = next_tokens(rows)
            hiddens = model(rows, hiddens=True).hiddens
            losses = [score_labels(model, normed(model, h[:, :-1]), target) for h in hiddens or ()]
            total += torch.stack([loss.total.double() for loss in losses])
            count += losses[-1].count
    losses_at = (total / count).tolist()
    table = Table("Loss of an exit after each layer", ["layer", "loss"], [[i, loss] for i, loss in enumerate(losses_at)])
    found = {"exit_loss": losses_at[at - 1], "val_loss": losses_at[-1], "exit_gap": losses_at[at - 1] / losses_at[-1] - 1}
    return Findings(found, tables=[table])


def check_exits(spec: ModelSpec, *, at: int | None, **_: Any) -> None:
    """Raises BadInput: there is no such layer to leave the model after."""
    if at is not None and not 1 <= at <= spec.stack.depth:
        raise BadInput(f"at is a number of layers, 1 to {spec.stack.depth}; it is {at}")


def self_speculation(
    model: Model,
    data: Any,
    *,
    exits: Sequence[int] = (2, 4),
    drafts: Sequence[int] = (2, 4, 6),
    confidence: float = 0.0,
    split: str = "validation",
    prompts: int = 4,
    prompt: int = 32,
    new: int = 64,
    repeats: int = 3,
) -> Findings:
    """Greedy self-speculative decoding against ordinary cached decoding of the same prompts, one at a time, in turns.

    Every text is made `repeats` times, of which the median of the times counts. On a CPU they are seconds of the process, which other
    processes do not lengthen.

    Metrics, of the pair of exit and draft with the fewest calls of layers, which is named in a note: `acceptance`, share of drafted tokens that
    stayed; `tokens_per_pass`, new tokens for every pass through the layers above the exit; `calls_share`, calls of layers over ordinary
    decoding's, where a call for several tokens counts once; `speedup`, tokens a second over ordinary decoding's. `identical`, share of all
    texts that are ordinary decoding's, token for token (1 but for ties in the last bits of scores); `tokens_per_second` of ordinary decoding.

    Args:
        confidence: see `layerwise.infer.speculative.SelfSpeculation`.
    """
    check_speculation(model.spec, exits=exits, drafts=drafts, confidence=confidence, repeats=repeats)
    rows = next(batches(split_of(data, split), prompts, 1, model.device))["input_ids"][:, :prompt]
    pairs = [(e, d) for e in exits for d in drafts]
    plain = 0.0
    seconds = dict.fromkeys(pairs, 0.0)
    accepted, drafted, rounds = dict.fromkeys(pairs, 0), dict.fromkeys(pairs, 0), dict.fromkeys(pairs, 0)
    same = 0
    generate(model, rows[:1], new=4)  # what is slow once only
    for ids in rows.split(1):
        attempts: list[Callable[[], Any]] = [partial(generate, model, ids, new=new)]
        attempts += [partial(self_speculate, model, ids, exit_layer=e, draft=d, confidence=confidence, new=new) for e, d in pairs]
        turns = [[_timed(call, model.device) for call in attempts] for _ in range(repeats)]
        text, *made = (result for result, _ in turns[0])
        spent, *each = (median(turn[i][1] for turn in turns) for i in range(len(attempts)))
        plain += spent
        for pair, result, taken in zip(pairs, made, each, strict=True):
            seconds[pair] += taken
            accepted[pair] += result.accepted
            drafted[pair] += result.drafted
            rounds[pair] += result.rounds
            same += int(torch.equal(result.ids, text))
    depth, tokens = model.stack.depth, len(rows) * new
    # The layers below the exit are called once for every draft and once for the token before the first, the others once a round.
    calls = {(e, d): (e * drafted[e, d] + depth * rounds[e, d]) / (depth * tokens) for e, d in pairs}
    best = min(pairs, key=lambda pair: calls[pair])
    share = {pair: accepted[pair] / max(drafted[pair], 1) for pair in pairs}
    table = Table(
        "Self-speculative decoding",
        ["exit", "draft", "acceptance", "tokens a pass", "share of calls", "speedup"],
        [[*p, share[p], tokens / rounds[p], calls[p], plain / seconds[p]] for p in pairs],
    )
    found = {
        "acceptance": share[best],
        "tokens_per_pass": tokens / rounds[best],
        "calls_share": calls[best],
        "speedup": plain / seconds[best],
        "identical": same / (len(pairs) * len(rows)),
        "tokens_per_second": tokens / plain,
    }
    return Findings(found, tables=[table], notes=[f"fewest calls: {best[0]} layers draft {best[1]} tokens"])


def check_speculation(spec: ModelSpec, *, exits: Sequence[int], drafts: Sequence[int], confidence: float, repeats: int, **_: Any) -> None:
    """Raises BadInput: nothing to time, or a pair of exit and draft that the model cannot decode with."""
    if repeats < 1:
        raise BadInput(f"repeats is at least 1; it is {repeats}")
    if not exits or not drafts:
        raise BadInput(f"exits and drafts have at least one entry each; got {list(exits)} and {list(drafts)}")
    for exit_layer in exits:
        check_drafting(spec, exit_layer=exit_layer, draft=min(drafts), confidence=confidence)


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    began = clock()
    made = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return made, clock() - began
