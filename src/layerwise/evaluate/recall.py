"""Questions about what stood further up in a text, answered from the cache."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from layerwise.analyze.findings import Findings, Table
from layerwise.data.recall import questions
from layerwise.errors import BadInput
from layerwise.evaluate.batches import inference, split_of
from layerwise.infer.generate import generate
from layerwise.models.heads import LMHead
from layerwise.models.model import Model
from layerwise.nn.cache import Cache


@dataclass
class Text:
    """A text in tokens: what is read at once, and what is read after it token by token.

    Attributes:
        context, asked: tokens. spans: of every question its first token, its answer's first and the one behind it, within `asked`.
        distances: tokens between an answer and what it repeats.
    """

    context: list[int]
    asked: list[int]
    spans: list[tuple[int, int, int]]
    distances: list[int]


@dataclass
class _Count:
    """Answers, right ones among them, and their summed loss, by the part of the text that lay between."""

    asked: Tensor
    right: Tensor
    loss: float = 0.0
    tokens: int = 0
    bytes: float = 0.0
    share: float = 0.0
    texts: int = 0


def recall(
    model: Model,
    data: Any,
    *,
    by: Literal["reading", "generation"] = "reading",
    beyond: int = 0,
    split: str = "validation",
    batch: int = 32,
    batches_at_most: int | None = None,
) -> Findings:
    """How many questions of a made-up text (`builtin:key-values`, `lines`, `needle`) are answered, with the model's own cache.

    The context is read in one pass, which is exact whatever the cache keeps; questions follow token by token.

    Metrics: `recall_accuracy`, the share of numbers that greedy decoding gets right whole; `answer_loss`, nats a token of an answer given
    those before it (`reading` only); `cache_bytes` of a text when it has been read, as stored, and `cache_share`, the same against a cache of
    all keys and values, where numbers that are not packed count 16 bits in both, as if the model ran in half precision.

    Args:
        by: `reading` goes on with the right answers, so all questions of a text are asked in one go (what is right then is what generation
            would write); `generation` asks each question alone and writes the answer.
        beyond: only answers that lie further back than so many tokens count.
    """
    if not isinstance(model.head, LMHead) or not model.causal or model.decoder is not None:
        raise BadInput("recall continues texts: it needs a causal decoder with a head of kind lm")
    split_of(data, split)
    texts = _texts(data, split)
    starts = range(0, len(texts), batch)
    if batches_at_most is not None:
        starts = range(0, min(len(texts), batch * batches_at_most), batch)
    longest = max(max(t.distances) for t in texts)
    count = _Count(torch.zeros(longest + 1), torch.zeros(longest + 1))
    with inference(model):
        for start in starts:
            (_read if by == "reading" else _generate)(model, texts[start : start + batch], count)
    return _findings(count, beyond, by)


def _texts(data: Any, split: str) -> list[Text]:
    """The texts of a split that ask something.

    Raises:
        BadInput: none does.
    """
    made = []
    for text in data.documents(split):
        found = questions(text)
        if not found:
            continue
        pieces = [text[: found[0].begin]]
        ends = [*(q.begin for q in found[1:]), found[-1].end]
        for q, end in zip(found, ends, strict=True):
            pieces += [text[q.begin : q.answer], text[q.answer : q.end], text[q.end : end]]
        pieces += [text[: q.said] for q in found]
        tokens = [e.ids for e in data.tokenizer.encode_batch(pieces, add_special_tokens=False)]
        context, said = tokens[0], tokens[1 + 3 * len(found) :]
        asked: list[int] = []
        spans = []
        for i in range(len(found)):
            prompt, answer, rest = tokens[1 + 3 * i : 4 + 3 * i]
            begin = len(asked) + len(prompt)
            spans.append((len(asked), begin, begin + len(answer)))
            asked += [*prompt, *answer, *rest]
        distances = [len(context) + begin - len(before) for (_, begin, _), before in zip(spans, said, strict=True)]
        made.append(Text(context, asked, spans, distances))
    if not made:
        raise BadInput(f"recall asks questions about texts, and {data.spec.source} holds none: use builtin:key-values, lines or needle")
    return made


def _read(model: Model, texts: Sequence[Text], count: _Count) -> None:
    """Read contexts at once and what follows token by token; see at every token of an answer whether it was expected."""
    cache, mask = Cache(), None
    context, real = _padded([t.context for t in texts], model, left=True)
    asked, asked_real = _padded([t.asked for t in texts], model)
    if not bool(real.all() and asked_real.all()):
        mask = real
    hidden = [model(_batch(context, mask), cache=cache).hidden[:, -1]]
    for i in range(asked.shape[1]):
        if mask is not None:
            mask = torch.cat([mask, asked_real[:, i : i + 1]], dim=1)
        hidden.append(model(_batch(asked[:, i : i + 1], mask), cache=cache).hidden[:, 0])
    assert isinstance(model.head, LMHead)
    logits = model.head(torch.stack(hidden[:-1], dim=1), model.token_matrix).float()
    right = logits.argmax(dim=-1) == asked
    loss = -logits.log_softmax(dim=-1).gather(2, asked[..., None]).squeeze(2)
    for row, text in enumerate(texts):
        for (_, begin, end), distance in zip(text.spans, text.distances, strict=True):
            _add(count, distance, bool(right[row, begin:end].all()))
            count.loss += loss[row, begin:end].sum().item()
            count.tokens += end - begin
    _weigh(model, cache, texts, count)


def _generate(model: Model, texts: Sequence[Text], count: _Count) -> None:
    """Read contexts at once; ask each question alone behind them, and let the answer be written."""
    context, real = _padded([t.context for t in texts], model, left=True)
    read = Cache()
    model(_batch(context, None if bool(real.all()) else real), cache=read)
    for i in range(max(len(t.spans) for t in texts)):
        rows = [r for r, t in enumerate(texts) if i < len(t.spans)]
        prompts, wanted = [], []
        for r in rows:
            first, begin, end = texts[r].spans[i]
            prompts.append(texts[r].asked[first:begin])
            wanted.append(texts[r].asked[begin:end])
        ids, prompt_real = _padded(prompts, model, left=True)
        cache = copy.deepcopy(read)
        kept = torch.tensor(rows, device=ids.device)
        cache.reorder(kept)
        mask = None
        if not bool(real.all() and prompt_real.all()):
            mask = torch.cat([real[kept], prompt_real], dim=1)
        # All but the last token first, so that the cache, and not a pass that sees everything, is what the answer comes from.
        for j in range(ids.shape[1] - 1):
            model(_batch(ids[:, j : j + 1], None if mask is None else mask[:, : context.shape[1] + j + 1]), cache=cache)
        made = generate(model, ids[:, -1:], new=max(map(len, wanted)), attention_mask=mask, cache=cache)[:, 1:].tolist()
        for r, answer, want in zip(rows, made, wanted, strict=True):
            _add(count, texts[r].distances[i], answer[: len(want)] == want)
        if i == 0:
            _weigh(model, cache, [Text(texts[r].context, [*p, *w], [], []) for r, p, w in zip(rows, prompts, wanted, strict=True)], count)


def _padded(rows: Sequence[list[int]], model: Model, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one (b, n) tensor, and which of it is real."""
    side = "left" if left else "right"
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side).to(model.device)
    real = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True, padding_side=side)
    return ids, real.to(model.device)


def _batch(ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}


def _add(count: _Count, distance: int, right: bool) -> None:
    count.asked[distance] += 1
    count.right[distance] += right


def _weigh(model: Model, cache: Cache, texts: Sequence[Text], count: _Count) -> None:
    """Add what the cache holds, a text."""
    kept = cache.kept()
    whole = sum(4 * (s.kv_heads or s.heads) * (s.head_dim or 1) for s in model.stack.spec.layers) * sum(
        len(t.context) + len(t.asked) for t in texts
    )
    count.bytes += sum(t.numel() * t.element_size() for t in kept)
    count.share += len(texts) * sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in kept) / whole
    count.texts += len(texts)


def _findings(count: _Count, beyond: int, by: str) -> Findings:
    far = slice(beyond + 1, None)
    if not int(count.asked[far].sum()):
        raise BadInput(f"beyond: no answer lies further back than {beyond} tokens; the furthest is {len(count.asked) - 1} back")
    metrics = {"recall_accuracy": float(count.right[far].sum() / count.asked[far].sum())}
    if by == "reading":
        metrics["answer_loss"] = count.loss / count.tokens
    metrics |= {"cache_bytes": count.bytes / count.texts, "cache_share": count.share / count.texts}
    width = max(1, 2 ** math.floor(math.log2(len(count.asked) / 8)))
    lines: list[list[Any]] = []
    for start in range(0, len(count.asked), width):
        asked = int(count.asked[start : start + width].sum())
        if asked:
            lines.append([f"{start} to {start + width - 1}", asked, float(count.right[start : start + width].sum()) / asked])
    return Findings(metrics, tables=[Table("Recall by distance", ["tokens back", "questions", "accuracy"], lines)])
