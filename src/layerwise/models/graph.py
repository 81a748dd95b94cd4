"""The computational graph of a network: its operations, what feeds them, and the shapes of their parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from layerwise.embed.graph import PRIMITIVES
from layerwise.errors import BadInput

CUTOFF = 50
"""Longest path that is a virtual edge, as in GHN-3."""
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution", "linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "embedding")
NORMS = {"batch_norm": "bn", "native_batch_norm": "bn", "layer_norm": "ln", "group_norm": "ln", "rms_norm": "ln", "instance_norm": "ln"}
POOLS = {"max_pool1d": "max_pool", "max_pool2d": "max_pool", "max_pool2d_with_indices": "max_pool", "adaptive_max_pool2d": "max_pool",
         "avg_pool1d": "avg_pool", "avg_pool2d": "avg_pool", "adaptive_avg_pool1d": "avg_pool", "adaptive_avg_pool2d": "avg_pool"}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """A tensor of a node. `gain` and `shift` are a norm's weight and any bias; `matrix` is everything else."""

    name: str
    shape: torch.Size
    role: str


@dataclass
class Node:
    """One operation. Its parameters' order is theirs in the call; inputs are numbers of earlier nodes."""

    op: str
    inputs: tuple[int, ...]
    parameters: tuple[Parameter, ...] = ()

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Output channels, input channels, rows and columns of its first parameter; zeros without one."""
        return shape4(self.parameters[0].shape) if self.parameters else (0, 0, 0, 0)


@dataclass
class Graph:
    """Nodes in the order of execution, the input first.

    Attributes:
        classifier: names of the parameters that make the network's scores.
    """

    nodes: list[Node]
    classifier: frozenset[str] = frozenset()
    _paths: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def parameters(self) -> dict[str, torch.Size]:
        """Every parameter of the network by name."""
        return {p.name: p.shape for node in self.nodes for p in node.parameters}

    @property
    def edges(self) -> Bool[Tensor, "n n"]:
        """[i, j]: node i feeds node j. Upper triangular."""
        found = torch.zeros(len(self.nodes), len(self.nodes), dtype=torch.bool)
        for j, node in enumerate(self.nodes):
            found[list(node.inputs), j] = True
        return found

    def paths(self, cutoff: int = CUTOFF) -> Int[Tensor, "n n"]:
        """[i, j]: edges on the shortest path from node i to j, 0 where there is none of at most `cutoff`. 1 is a real edge, more a virtual one."""
        if cutoff not in self._paths:
            self._paths[cutoff] = shortest_paths(self.edges, cutoff)
        return self._paths[cutoff]


def shape4(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """A parameter's shape as a convolution's: a vector has one input, a matrix a 1x1 kernel, leading dimensions of 1 count only up to there."""
    sizes = list(shape)
    while len(sizes) > 2 and sizes[0] == 1 and len(sizes) != 4:
        sizes = sizes[1:]
    if len(sizes) == 4 and sizes[0] == 1 and sizes[1] == 1 and sizes[2] * sizes[3] > 1024:
        sizes = sizes[2:]  # a table of positions
    if len(sizes) == 3:
        sizes = [sizes[0], sizes[1], 1, sizes[2]]
    if len(sizes) > 4:
        sizes = [*sizes[:2], math.prod(sizes[2:-1]), sizes[-1]]
    sizes = [*sizes, *[1] * (4 - len(sizes))]
    return sizes[0], sizes[1], sizes[2], sizes[3]


def shortest_paths(edges: Bool[Tensor, "n n"], cutoff: int) -> Int[Tensor, "n n"]:
    """Lengths of shortest directed paths of at most `cutoff` edges, 0 where there is none. Nodes are in topological order."""
    n = len(edges)
    far = n + 1
    found = torch.full((n, n), far, dtype=torch.long)
    for j in range(n):
        found[j, j] = 0
        before = edges[:, j].nonzero()[:, 0]
        if len(before):
            found[:j, j] = found[:j, before].amin(dim=1) + 1
    return found.masked_fill(found > min(cutoff, n), 0)


def graph_batch(graphs: Sequence[Graph], device: torch.device | str = "cpu", classes: int | None = None) -> dict[str, Tensor]:
    """Graphs side by side, the smaller ones padded: `graph_ops` (b, n), `graph_sizes` (b, n, 4), `graph_paths` (b, n, n), `graph_mask` (b, n).

    Args:
        classes: show every classifier as if it made so many scores (None: as many as it does).
    """
    n = max(len(graph.nodes) for graph in graphs)
    ops = torch.zeros(len(graphs), n, dtype=torch.long)
    sizes = torch.zeros(len(graphs), n, 4, dtype=torch.long)
    paths = torch.zeros(len(graphs), n, n, dtype=torch.long)
    mask = torch.zeros(len(graphs), n, dtype=torch.bool)
    for i, graph in enumerate(graphs):
        k = len(graph.nodes)
        ops[i, :k] = torch.tensor([PRIMITIVES.index(node.op) for node in graph.nodes])
        sizes[i, :k] = torch.tensor([node.size for node in graph.nodes])
        if classes is not None:
            sizes[i, [j for j, node in enumerate(graph.nodes) if any(p.name in graph.classifier for p in node.parameters)], 0] = classes
        paths[i, :k, :k] = graph.paths()
        mask[i, :k] = True
    made = {"graph_ops": ops, "graph_sizes": sizes, "graph_paths": paths, "graph_mask": mask}
    return {name: tensor.to(device) for name, tensor in made.items()}


def trace(model: nn.Module, *example: Any) -> Graph:
    """The graph of a network of ours or of plain PyTorch, from one run of it without values (on the meta device).

    `torch.fx` records the operations that run; nodes that have no word among the fifteen primitives (activations, reshapes, dropout)
    are passed over: what feeds them feeds what they feed. A linear map or convolution with a bias is two nodes.

    Args:
        example: the network's arguments, tensors or mappings of tensors, of which only shapes and dtypes matter. None are needed for a
            model of ours that reads images or tokens.

    Raises:
        BadInput: the network does not run on the example without values; the reason is given.
    """
    example = example or (_example(model),)
    parameters = {name: torch.empty_like(p, device="meta") for name, p in model.named_parameters()}
    buffers = {name: torch.empty_like(b, device="meta") for name, b in model.named_buffers()}

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor], example: Any) -> Any:
        return scores(model, {**parameters, **buffers}, *example)

    training = {module: module.training for module in model.modules()}
    model.train()
    try:
        with torch.no_grad():
            traced = make_fx(run, tracing_mode="real", pre_dispatch=True)(parameters, buffers, _without_values(example))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise BadInput(
            f"{type(model).__name__} cannot be traced by torch.fx on tensors without values: {type(error).__name__}: {reason}; "
            "give an example of its inputs, and let no branch depend on the values of a tensor"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    return _Reading(traced.graph, {name: p.shape for name, p in parameters.items()}, len(buffers)).graph


class _Scores(nn.Module):
    """What a network is for: the scores of a model of ours (which makes them when asked), or its hidden vectors; a plain one's result."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *arguments: Any) -> Any:
        out = self.network(*arguments)
        if not hasattr(self.network, "spec"):
            return out
        return out.hidden if self.network.head is None else out.logits


def scores(network: nn.Module, tensors: Mapping[str, Tensor], *arguments: Any) -> Any:
    """The scores that a network makes with these parameters and buffers instead of its own; gradients flow into them."""
    return functional_call(_Scores(network), {f"network.{name}": tensor for name, tensor in tensors.items()}, arguments)


def _example(model: Any) -> dict[str, Tensor]:
    """A batch that a model of ours can read."""
    embedding = getattr(getattr(model, "spec", None), "embedding", None)
    if getattr(embedding, "kind", None) == "tokens":
        ids = torch.empty(2, 8, dtype=torch.long, device="meta")
        return {"input_ids": ids, **({"decoder_input_ids": ids} if model.spec.decoder is not None else {})}
    if getattr(embedding, "size", None) is None or getattr(embedding, "channels", None) is None:
        raise BadInput(f"{type(model).__name__} is traced with an example of its inputs: trace(model, torch.zeros(2, 3, 32, 32))")
    return {"pixel_values": torch.empty(2, embedding.channels, *embedding.size, device="meta")}  # type: ignore[union-attr]


def _without_values(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    if isinstance(value, Mapping):
        return {name: _without_values(inner) for name, inner in value.items()}
    return type(value)(_without_values(inner) for inner in value) if isinstance(value, list | tuple) else value


class _Reading:
    """From what `torch.fx` recorded to nodes.

    Every recorded value is known by what it comes from: numbers of nodes (`feeds`) or names of parameters (`holds`).
    """

    def __init__(self, recorded: torch.fx.Graph, shapes: dict[str, torch.Size], buffers: int) -> None:
        self.shapes = shapes
        self.nodes = [Node("input", ())]
        self.feeds: dict[Any, tuple[int, ...]] = {}
        self.holds: dict[Any, tuple[str, ...]] = {}
        self.taken: set[str] = set()
        names = [*shapes, *[""] * buffers]
        result: tuple[int, ...] = ()
        for i, value in enumerate(recorded.find_nodes(op="placeholder")):
            if i < len(names):
                self.holds[value] = (names[i],) if names[i] else ()
            else:
                self.feeds[value] = (0,)
        for value in recorded.nodes:
            if value.op == "call_function":
                self._read(value)
            elif value.op == "output":
                result = self._together(value.all_input_nodes)
        classifier = self._classifier(result)
        for name in shapes:
            if name not in self.taken:  # what the example did not use
                self._place("pos_enc" if len(shapes[name]) > 1 else "bias", (), (name,), "matrix" if len(shapes[name]) > 1 else "shift")
        self.graph = Graph(self.nodes, classifier)

    def _together(self, values: Sequence[Any]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(i for value in values for i in self.feeds.get(value, ())))

    def _place(self, op: str, inputs: tuple[int, ...], names: Sequence[str] = (), role: str = "matrix") -> tuple[int, ...]:
        """A new node that owns those of the parameters that no earlier node has."""
        fresh = [name for name in names if name not in self.taken]
        self.taken |= set(fresh)
        self.nodes.append(Node(op, inputs, tuple(Parameter(name, self.shapes[name], role) for name in fresh)))
        return (len(self.nodes) - 1,)

    def _read(self, value: Any) -> None:
        kind = getattr(getattr(value.target, "overloadpacket", value.target), "__name__", str(value.target)).rstrip("_")
        inputs = value.all_input_nodes
        into, held = self._together(inputs), [v for v in inputs if self.holds.get(v)]
        if not into:
            self.holds[value] = tuple(dict.fromkeys(name for v in held for name in self.holds[v]))
            return
        self.feeds[value] = self._step(kind, value, inputs, into, held)

    def _step(self, kind: str, value: Any, inputs: Sequence[Any], into: tuple[int, ...], held: Sequence[Any]) -> tuple[int, ...]:
        if kind in NORMS:
            return self._norm(NORMS[kind], value, into, held)
        if kind in CONVOLUTIONS and held:
            for v in held:
                vector = kind != "embedding" and all(len(self.shapes[name]) == 1 for name in self.holds[v])
                for name in self.holds[v]:
                    into = self._place("bias" if vector else _convolution(value), into, (name,), "shift" if vector else "matrix")
            return into
        if kind in POOLS or kind == "mean":
            whole = value.meta["val"].shape[2:].numel() == 1 if "val" in value.meta else kind == "mean"
            return self._place("glob_avg" if kind == "mean" or (whole and "avg" in kind) else POOLS[kind], into)
        if kind == "scaled_dot_product_attention" or (kind in CONVOLUTIONS and len(into) > 1):
            return self._place("msa", into)
        if kind in ("cat", "stack", "concat"):
            for v in held:
                into = (*into, *self._place("pos_enc", (), self.holds[v]))
            return self._place("concat", into) if len(into) > 1 else into
        for v in held:
            vector = all(sum(n > 1 for n in self.shapes[name]) <= 1 for name in self.holds[v])
            op = "pos_enc" if not vector else "ln" if kind == "mul" else "bias"
            into = self._place(op, into, self.holds[v], "matrix" if not vector else "gain" if kind == "mul" else "shift")
        if len({self.feeds[v] for v in inputs if v in self.feeds}) > 1 and len(into) > 1:
            return self._place("cse" if kind == "mul" else "sum", into)
        return into

    def _norm(self, op: str, value: Any, into: tuple[int, ...], held: Sequence[Any]) -> tuple[int, ...]:
        """A norm with its gain and its shift, which are told apart by their places among the arguments."""
        names = [(name, "gain" if i == 0 else "shift") for i, v in enumerate(held) for name in self.holds[v] if name not in self.taken]
        (place,) = self._place(op, into)
        self.nodes[place].parameters = tuple(Parameter(name, self.shapes[name], role) for name, role in names)
        self.taken |= {name for name, _ in names}
        return (place,)

    def _classifier(self, result: tuple[int, ...]) -> frozenset[str]:
        """The last linear map, with its bias, if the scores come from it directly."""
        if len(result) != 1:
            return frozenset()
        last = self.nodes[result[0]]
        nodes = [last] if last.op != "bias" else [last, *(self.nodes[i] for i in last.inputs)]
        return frozenset(p.name for node in nodes if node.op in ("conv", "bias") for p in node.parameters)


def _convolution(value: Any) -> str:
    """Depth-wise (grouped), dilated or plain."""
    arguments = dict(enumerate(value.args))
    dilation, groups = arguments.get(5, 1), arguments.get(6, 1)
    if "conv" not in str(value.target):
        return "conv"
    if isinstance(groups, int) and groups > 1:
        return "sep_conv"
    return "dil_conv" if any(d > 1 for d in (dilation if isinstance(dilation, list | tuple) else [dilation])) else "conv"
