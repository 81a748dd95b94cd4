"""How probable a model finds given continuations, and questions answered by the most probable one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.analyze.findings import Findings
from layerwise.errors import BadInput
from layerwise.evaluate.batches import inference
from layerwise.models.heads import LMHead
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec

Pair = tuple[Sequence[int], Sequence[int]]


def log_likelihoods(model: Model, pairs: Sequence[Pair], *, batch: int = 16) -> list[tuple[float, bool]]:
    """For each (context, continuation) in tokens: log p(continuation | context) in nats, and whether greedy decoding would say it.

    Only the continuations are scored. What `lm_eval` calls `loglikelihood`.

    Raises:
        BadInput: the model cannot continue text, or a context or continuation is empty.
    """
    if not isinstance(model.head, LMHead) or not model.causal:
        raise BadInput("log-likelihoods of continuations need a causal model with a head of kind lm")
    if (empty := next((i for i, (a, b) in enumerate(pairs) if not len(a) or not len(b)), None)) is not None:
        raise BadInput(f"pair {empty}: a context and a continuation have at least one token each")
    # Rows of like length together: little padding.
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    found: dict[int, tuple[float, bool]] = {}
    with inference(model):
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            found |= dict(zip(rows, _scored(model, [pairs[i] for i in rows]), strict=True))
    return [found[i] for i in range(len(pairs))]


def _scored(model: Model, pairs: list[Pair]) -> Iterator[tuple[float, bool]]:
    device = model.device
    whole = [torch.tensor([*a, *b], device=device) for a, b in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
    lengths = torch.tensor([len(w) for w in whole], device=device)
    begins = torch.tensor([len(a) for a, _ in pairs], device=device)
    place = torch.arange(ids.shape[1], device=device)
    out = model({"input_ids": ids, "attention_mask": (place < lengths[:, None]).long()})
    wanted = (place >= begins[:, None]) & (place < lengths[:, None])
    assert isinstance(model.head, LMHead)
    logits: Tensor = model.head(out.hidden[:, :-1][wanted[:, 1:]], model.token_matrix).float()
    labels = ids[wanted]
    scores = logits.log_softmax(dim=-1).gather(1, labels[:, None]).squeeze(1)
    greedy = logits.argmax(dim=-1) == labels
    counts = (lengths - begins).tolist()
    for score, right in zip(scores.split(counts), greedy.split(counts), strict=True):
        yield score.sum().item(), bool(right.all())


def multiple_choice(model: Model, data: Any, *, file: str, batch: int = 16) -> Findings:
    """Questions answered by the continuation that the model finds most probable.

    Metrics: `accuracy`; `accuracy_normalized`, with log-likelihoods divided by the continuation's number of characters; `gold_log_likelihood`,
    the mean of the right answers'. The same as `acc` and `acc_norm` of `lm_eval`.

    Args:
        file: jsonl, a line each `{"context": text, "choices": [text, ...], "answer": index}`. A continuation usually begins with a space.
    """
    if data.tokenizer is None:
        raise BadInput("multiple-choice reads text: the data needs a tokenizer")
    questions = list(_questions(Path(file)))
    pairs = [pair(data.tokenizer, q["context"], choice) for q in questions for choice in q["choices"]]
    scores = iter([score for score, _ in log_likelihoods(model, pairs, batch=batch)])
    right = normalized = gold = 0.0
    for q in questions:
        values = [next(scores) for _ in q["choices"]]
        scaled = [v / max(len(c), 1) for v, c in zip(values, q["choices"], strict=True)]
        right += values.index(max(values)) == q["answer"]
        normalized += scaled.index(max(scaled)) == q["answer"]
        gold += values[q["answer"]]
    n = len(questions)
    return Findings({"accuracy": right / n, "accuracy_normalized": normalized / n, "gold_log_likelihood": gold / n})


def check_questions(spec: ModelSpec, *, file: str, **_: Any) -> None:
    """Raises BadInput: the file cannot be read, or holds no questions in that form."""
    for _question in _questions(Path(file)):
        pass


def pair(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Tokens of a context and of what follows it, cut where the context's own tokens end; spaces at its end go to what follows."""
    ends = len(context) - len(context.rstrip())
    if ends:
        context, continuation = context[:-ends], context[-ends:] + continuation
    before = tokenizer.encode(context, add_special_tokens=False).ids
    return before, tokenizer.encode(context + continuation, add_special_tokens=False).ids[len(before) :]


def _questions(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"file: {path} cannot be read: {error}") from error
    if not lines:
        raise BadInput(f"file: {path} holds no question")
    for number, line in enumerate(lines, 1):
        try:
            q = json.loads(line)
            fine = isinstance(q["context"], str) and all(isinstance(c, str) for c in q["choices"]) and 0 <= q["answer"] < len(q["choices"])
        except (ValueError, KeyError, TypeError, RecursionError):
            fine = False
        if not fine:
            raise BadInput(f"file: line {number} of {path} is not {{'context': text, 'choices': [text, ...], 'answer': index}}")
        yield q
