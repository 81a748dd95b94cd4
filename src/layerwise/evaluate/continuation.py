"""Prompts continued and compared with their targets: BLEU, token accuracy, speed, and which layers were run."""

from __future__ import annotations

import itertools
import time
from typing import Any

import sacrebleu
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from layerwise.analyze.findings import Findings, Table
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.infer.generate import generate
from layerwise.infer.routes import decisions, skipped
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.nn.sequence_router import GATING, Gating
from layerwise.objectives.language import next_tokens


def continuation(
    model: Model,
    data: Any,
    *,
    split: str = "validation",
    batch: int = 32,
    batches_at_most: int | None = None,
    new: int | None = None,
    skip: float | None = None,
) -> Findings:
    """Greedy cached decoding of the prompts of a split until the end token, against the targets.

    Metrics: `bleu` and `bleu_1` (sacreBLEU's corpus BLEU up to 4-grams and of single words, 0 to 100; Papineni et al. 2002; Post 2018), the mean
    over tasks, and each task's as `<task>_bleu` and `<task>_bleu_1`; `token_accuracy` and `val_loss` (nats) of the targets' tokens, read with
    the right ones before them; `layers_run`, mean over prompts; `tokens_per_second` of decoding, all rows together; with several tasks `task_distance`, the
    Jaccard distance 1 - sum_i min / sum_i max of the shares of their prompts that skip layer i (two sets, where all prompts of a task agree).

    Args:
        new: longest continuation in tokens (None: what `data.length` leaves room for).
        skip: for a model with routers: the share of all layers that each prompt skips, see `layerwise.infer.routes.decisions` (None: the
            routers go by their thresholds).

    Raises:
        BadInput: the data has no prompts with targets.
    """
    if not data.spec.pairs:
        raise BadInput("continuation compares with targets: name the columns of prompts and targets in data.pairs")
    check_continuation(model.spec, skip=skip)
    said: dict[int, list[str]] = {}
    wanted: dict[int, list[str]] = {}
    runs: dict[int, list[Tensor]] = {}
    right = count = tokens = 0
    loss = seconds = 0.0
    with inference(model):
        for rows in batches(split_of(data, split), batch, batches_at_most, model.device):
            ids, mask = left_padded(rows["input_ids"], rows["prompt_mask"].bool())
            runs_here = decisions(model, {"input_ids": ids, "attention_mask": mask.long()}, skip=skip)
            extras = {} if skip is None else {GATING: Gating(decisions=dict(enumerate(runs_here.T)))}
            target = next_tokens(rows)
            scores = model(rows, extras=extras).logits[:, :-1][target != -100].float()
            labels = target[target != -100]
            loss += torch.nn.functional.cross_entropy(scores, labels, reduction="sum").item()
            right += int((scores.argmax(dim=-1) == labels).sum())
            count += len(labels)
            room = new or rows["input_ids"].shape[1] - int(rows["prompt_mask"].sum(dim=1).min())
            began = time.perf_counter()
            made = generate(model, ids, new=room, stop=data.eos_id, attention_mask=mask.long(), extras=extras)[:, ids.shape[1] :]
            tokens += int((made != data.eos_id).sum())  # waits for the device
            seconds += time.perf_counter() - began
            texts = data.tokenizer.decode_batch([_until(row, data.eos_id) for row in made.tolist()])
            answers = data.tokenizer.decode_batch([_until(row[row != -100].tolist(), data.eos_id) for row in target])
            for task, text, answer, run in zip(rows["tasks"].tolist(), texts, answers, runs_here, strict=True):
                said.setdefault(task, []).append(text)
                wanted.setdefault(task, []).append(answer)
                runs.setdefault(task, []).append(run)
    found, names = {}, list(data.spec.pairs)
    for task in sorted(said):
        for metric, order in (("bleu", 4), ("bleu_1", 1)):
            found[f"{names[task]}_{metric}"] = sacrebleu.BLEU(max_ngram_order=order).corpus_score(said[task], [wanted[task]]).score
    for metric in ("bleu", "bleu_1"):
        found[metric] = sum(found[f"{names[task]}_{metric}"] for task in said) / len(said)
    shares = {task: 1 - torch.stack(rows).float().mean(dim=0) for task, rows in sorted(runs.items())}
    every = torch.stack([row for rows in runs.values() for row in rows])
    found |= {"token_accuracy": right / count, "val_loss": loss / count, "layers_run": every.sum(dim=1).float().mean().item()}
    found["tokens_per_second"] = tokens / seconds
    if len(shares) > 1:
        pairs = list(itertools.combinations(shares.values(), 2))
        found["task_distance"] = sum(jaccard_distance(a, b) for a, b in pairs) / len(pairs)
    skips = Table(
        "Share of prompts that skip a layer",
        ["layer", *(names[task] for task in shares)],
        [[i, *(share[i].item() for share in shares.values())] for i in range(model.stack.depth)],
    )
    first = [[names[task], said[task][i], wanted[task][i]] for task in said for i in range(min(3, len(said[task])))]
    return Findings(found, tables=[skips, Table("First continuations", ["task", "said", "target"], first)])


def check_continuation(spec: ModelSpec, *, skip: float | None, **_: Any) -> None:
    """Raises BadInput: fewer layers have a router than are to be skipped."""
    if skip is not None:
        skipped(spec, skip)


def left_padded(ids: Int[Tensor, "b s"], prompt: Bool[Tensor, "b s"]) -> tuple[Int[Tensor, "b p"], Bool[Tensor, "b p"]]:
    """The prompts that stand at the left of each row, moved to the right end of rows as long as the longest, and where they are."""
    lengths = prompt.sum(dim=1, keepdim=True)
    longest = int(lengths.max())
    places = torch.arange(longest, device=ids.device) - (longest - lengths)
    return ids.gather(1, places.clamp(min=0)), places >= 0


def jaccard_distance(a: Tensor, b: Tensor) -> float:
    """1 - sum min(a, b) / sum max(a, b) of weights in [0, 1]; 0 where both are empty."""
    union = torch.maximum(a, b).sum().item()
    return 1 - torch.minimum(a, b).sum().item() / union if union else 0.0


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
