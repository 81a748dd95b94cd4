"""For how many questions some chain of layer calls gives the right answer: an oracle, since the search sees the answer."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.analyze.findings import Findings, Table
from layerwise.errors import BadInput
from layerwise.evaluate.batches import batches, inference, split_of
from layerwise.infer.chain_search import Moves, Path, RandomSearch, TreeSearch, pareto, search, shortest
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.stack.spec import StackSpec


def chain_search(
    model: Model,
    data: Any,
    *,
    moves: Moves = "both",
    method: Literal["tree", "random"] = "tree",
    target: Literal["label", "wrong"] = "label",
    simulations: int = 200,
    questions: int = 100,
    c: float = 1.8,
    penalty: float = 5.0,
    explore: float = 0.1,
    split: str = "validation",
    seed: int | None = None,
) -> Findings:
    """Search, for each of some labelled rows, a path through a frozen classifier that gives its label (or, as a control, a wrong one).

    Metrics: `oracle_accuracy`, share of rows for which some path was found that gives the target; `accuracy` of the path as it is;
    `kept_shorter`, of the rows that were right, the share with a shorter right path; `corrected`, of those that were wrong, the share with a right one;
    `path_length` and `distinct_layers` of the shortest paths found, means; `evaluations` a row; `usage_entropy` (nats) of the layers in them.
    Nothing here is the accuracy of a usable system: the label steers the search.

    Args:
        target: `wrong` seeks one random wrong class a row, whose success rate is the level of chance of the oracle.
        method: `random` tries random paths instead of growing a tree.
        simulations, c, penalty, explore: see `layerwise.infer.chain_search.TreeSearch`. 1 simulation evaluates the path as it is.

    Raises:
        BadInput: the data has no labels, or fewer than one simulation or question is asked for.
    """
    check_chains(model.spec, simulations=simulations, questions=questions, c=c, penalty=penalty, explore=explore)
    rows = next(batches(split_of(data, split), questions, 1, model.device))
    if "labels" not in rows or rows["labels"].dim() != 1:
        raise BadInput("chain-search compares one answer a row with its label: the data needs labels")
    labels, depth, seed = rows["labels"], model.stack.depth, 0 if seed is None else seed
    wanted = labels if target == "label" else _wrong(labels, data.classes, seed)
    searches: list[TreeSearch | RandomSearch] = []
    for i in range(len(labels)):
        own = f"{seed}.{i}"
        tree = TreeSearch(depth, moves=moves, c=c, penalty=penalty, explore=explore, seed=own)
        searches.append(tree if method == "tree" else RandomSearch(depth, moves=moves, seed=own))

    def evaluate(which: list[int], paths: list[Path]) -> list[float]:
        index = torch.tensor(which, device=labels.device)
        answers = model({name: value[index] for name, value in rows.items()}, path=paths).logits.argmax(dim=-1)
        return (answers == wanted[index]).float().tolist()

    with inference(model):
        right = (model(rows).logits.argmax(dim=-1) == labels).tolist()
        search(searches, evaluate, simulations)
    return _summary([one.rewards for one in searches], right, depth, label=target == "label")


def check_chains(spec: ModelSpec, *, simulations: int, questions: int, c: float, penalty: float, explore: float, **_: Any) -> None:
    """Raises BadInput: fewer than one simulation or question, a search with such numbers, or layers that cannot stand for one another."""
    if simulations < 1 or questions < 1:
        raise BadInput(f"simulations and questions are at least 1; got {simulations} and {questions}")
    TreeSearch(spec.stack.depth, c=c, penalty=penalty, explore=explore)
    if not isinstance(spec.stack, StackSpec):
        raise BadInput("chain-search skips and repeats layers: it needs transformer layers, which all hand on the same stream")


def _wrong(labels: Tensor, classes: int, seed: int) -> Tensor:
    """A random other class for each row."""
    generator = torch.Generator().manual_seed(seed)
    return (labels + torch.randint(1, classes, labels.shape, generator=generator).to(labels.device)) % classes


def _summary(rewards: list[dict[Path, float]], right: list[bool], depth: int, label: bool) -> Findings:
    found = [shortest(row) for row in rewards]
    paths = [path for path in found if path is not None]
    metrics = {"accuracy": sum(right) / len(right), "oracle_accuracy": len(paths) / len(found)}
    metrics["evaluations"] = sum(map(len, rewards)) / len(rewards)
    if label:
        kept = [path for path, ok in zip(found, right, strict=True) if ok]
        lost = [path for path, ok in zip(found, right, strict=True) if not ok]
        metrics |= {"kept_shorter": sum(p is not None and len(p) < depth for p in kept) / len(kept)} if kept else {}
        metrics |= {"corrected": sum(p is not None for p in lost) / len(lost)} if lost else {}
    fronts: list[list[Any]] = []
    for i, row in enumerate(rewards[:10]):
        fronts += [[i, row[path], len(path), " ".join(map(str, path))] for path in pareto(row)]
    tables = [Table("Best paths of the first questions, by length", ["question", "reward", "calls", "path"], fronts)]
    if not paths:
        return Findings(metrics, tables=tables)
    metrics |= {"path_length": sum(map(len, paths)) / len(paths), "distinct_layers": sum(len(set(p)) for p in paths) / len(paths)}
    uses = Counter(i for path in paths for i in path)
    shares = [uses[i] / max(uses.total(), 1) for i in range(depth)]
    metrics["usage_entropy"] = -sum(s * math.log(s) for s in shares if s)
    lines: list[list[Any]] = []
    for i in range(depth):
        within = [path.count(i) for path in paths if i in path]
        lines.append([i, 1 - len(within) / len(paths), sum(within) / len(within) if within else 0.0, shares[i]])
    usage = Table("Shortest chains found", ["layer", "skipped", "calls where used", "share of calls"], lines)
    return Findings(metrics, tables=[usage, *tables])
