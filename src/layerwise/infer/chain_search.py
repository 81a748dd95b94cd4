"""Search for a chain of layer calls, some skipped and some repeated, that answers one question as wanted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from layerwise.errors import BadInput

Path = tuple[int, ...]
Action = tuple[int, int, int]
"""`(start, count, extra)`: without `extra` the `count` entries from `start` on are skipped, else they are called `extra` more times."""
Moves = Literal["both", "skip", "repeat"]
SIZES = (1, 2, 3, 4)


def actions(length: int, moves: Moves = "both", cap: int | None = None) -> Iterator[Action]:
    """All edits of a path of `length` calls that leave at most `cap` (None: any number)."""
    for count in SIZES:
        for start in range(length - count + 1):
            if moves != "repeat":
                yield start, count, 0
            if moves != "skip":
                yield from ((start, count, extra) for extra in SIZES if cap is None or length + count * extra <= cap)


def applied(path: Path, action: Action) -> Path:
    """The path after an edit; copies stand directly behind what they repeat."""
    start, count, extra = action
    block = path[start : start + count]
    return path[:start] + (block * (1 + extra) if extra else ()) + path[start + count :]


@dataclass(eq=False)
class Node:
    """A path in the tree. `value` is the sum of the rewards of all visits, `own` the visits that ended here."""

    path: Path
    parent: Node | None = None
    visits: int = 0
    own: int = 0
    value: float = 0.0
    children: list[Node] = field(default_factory=list)
    untried: list[Action] | None = None


class TreeSearch:
    """Monte Carlo tree search over edits of the path 0, ..., depth - 1.

    score(P) = Q / v + c sqrt(ln V / v) - penalty |P| / depth, with V the simulations so far. From the root on, the best child is
    followed; at each node on the way, with probability `explore`, and at one without children, an untried edit is tried
    instead. The first simulation evaluates the root. Rewards are kept by path, so no path is evaluated twice.

    Source: Li, Li and Zhou 2025, "Skip a Layer or Loop it? Test-Time Depth Adaptation of Pretrained LLMs", section 3 (arXiv 2507.07996). The
    paper gives neither c nor the longest path: 1.8, and twice the depth, are those of parameterlab/dr-llm.

    Args:
        moves: which edits there are. cap: longest path (None: twice the depth).
    """

    def __init__(
        self,
        depth: int,
        *,
        moves: Moves = "both",
        cap: int | None = None,
        c: float = 1.8,
        penalty: float = 5.0,
        explore: float = 0.1,
        seed: int | str = 0,
    ) -> None:
        if c < 0 or penalty < 0 or not 0 <= explore <= 1:
            raise BadInput(f"c and penalty are >= 0 and explore is a probability; got {c}, {penalty} and {explore}")
        self.depth, self.moves, self.cap, self.c, self.penalty, self.explore = depth, moves, cap or 2 * depth, c, penalty, explore
        self.random = random.Random(seed)
        self.root = Node(tuple(range(depth)))
        self.rewards: dict[Path, float] = {}
        self.simulations = 0

    def propose(self) -> Node:
        """The node whose path the next simulation runs."""
        node = self.root
        while node.visits:
            if node.untried is None:
                node.untried = list(actions(len(node.path), self.moves, self.cap))
                self.random.shuffle(node.untried)
            if node.untried and (not node.children or self.random.random() < self.explore):
                child = Node(applied(node.path, node.untried.pop()), node)
                node.children.append(child)
                return child
            if not node.children:
                return node
            node = max(node.children, key=self.score)
        return node

    def score(self, node: Node) -> float:
        """How promising a child is; infinity before its first visit."""
        if not node.visits:
            return math.inf
        wide = self.c * math.sqrt(math.log(max(self.simulations, 1)) / node.visits)
        return node.value / node.visits + wide - self.penalty * len(node.path) / self.depth

    def learn(self, node: Node, reward: float) -> None:
        """The simulation at `node` ended with a reward in [0, 1]."""
        self.simulations += 1
        self.rewards.setdefault(node.path, reward)
        node.own += 1
        at: Node | None = node
        while at is not None:
            at.visits += 1
            at.value += reward
            at = at.parent


class RandomSearch:
    """The control: the whole path, then paths after 1 to 4 random edits, none twice (within 100 tries)."""

    def __init__(self, depth: int, *, moves: Moves = "both", cap: int | None = None, seed: int | str = 0) -> None:
        self.depth, self.moves, self.cap = depth, moves, cap or 2 * depth
        self.random = random.Random(seed)
        self.rewards: dict[Path, float] = {}
        self.simulations = 0

    def propose(self) -> Node:
        """A node, of no tree, whose path the next simulation runs."""
        path = tuple(range(self.depth))
        for _ in range(100 if self.simulations else 0):
            path = tuple(range(self.depth))
            for _ in range(self.random.randint(1, 4)):
                choices = list(actions(len(path), self.moves, self.cap))
                path = applied(path, self.random.choice(choices)) if choices else path
            if path not in self.rewards:
                break
        return Node(path)

    def learn(self, node: Node, reward: float) -> None:
        """The simulation at `node` ended with a reward in [0, 1]."""
        self.simulations += 1
        self.rewards.setdefault(node.path, reward)


def search(
    searches: Sequence[TreeSearch | RandomSearch], evaluate: Callable[[list[int], list[Path]], Sequence[float]], simulations: int
) -> None:
    """Run one search a question side by side, so that the paths they want evaluated form one batch.

    Args:
        evaluate: (questions, paths) -> the reward of each question's path.
    """
    for _ in range(simulations):
        nodes = [one.propose() for one in searches]
        new = [i for i, node in enumerate(nodes) if node.path not in searches[i].rewards]
        fresh = dict(zip(new, evaluate(new, [nodes[i].path for i in new]), strict=True)) if new else {}
        for i, (one, node) in enumerate(zip(searches, nodes, strict=True)):
            one.learn(node, fresh[i] if i in fresh else one.rewards[node.path])


def pareto(rewards: dict[Path, float]) -> list[Path]:
    """The paths that no other one equals in reward while being shorter, or beats at equal length; one of each kind, shortest first."""
    front: list[Path] = []
    for path in sorted(rewards, key=lambda p: (len(p), -rewards[p], len(set(p)), p)):
        if not front or rewards[path] > rewards[front[-1]]:
            front.append(path)
    return front


def shortest(rewards: dict[Path, float]) -> Path | None:
    """The shortest path with reward 1; of several, one with the fewest different layers."""
    found = [path for path, reward in rewards.items() if reward >= 1]
    return min(found, key=lambda p: (len(p), len(set(p)), p)) if found else None
