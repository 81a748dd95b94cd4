"""Graph hypernetworks: from the graph of a network to all its parameters, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.models.graph import Graph, Parameter, graph_batch, shape4
from layerwise.models.spec import HeadSpec


class ParameterHead(nn.Module):
    """Vectors of nodes to the tensors of the network they describe, each of its exact shape.

    Matrices and convolutions: Linear d -> 4d s s, ReLU, of which the centre kh x kw positions are used; at each of them Linear 4d -> 8d,
    ReLU, Linear 8d -> d d, read as (d out, d in, kh, kw). What has more channels is tiled along them and cut. A classifier is made of
    the 1x1 matrix by ReLU and a linear map over its output channels. Vectors: Linear d -> 2d, ReLU, Linear 2d -> 2d, a gain and a
    shift. All are then scaled, see `normalized`.

    Source: Knyazev et al. 2021, "Parameter Prediction for Unseen Deep Architectures" (GHN-2), section 4, and the published code.
    """

    def __init__(self, spec: HeadSpec, width: int) -> None:
        super().__init__()
        assert spec.classes, "the number of classes is filled in before a model is built"
        self.spec, self.width = spec, width
        self.spread = nn.Linear(width, 4 * width * spec.kernel**2)
        self.hidden, self.matrix = nn.Linear(4 * width, 8 * width), nn.Linear(8 * width, width**2)
        self.classes = nn.Linear(width, spec.classes)
        self.vector_hidden, self.vector = nn.Linear(width, 2 * width), nn.Linear(2 * width, 2 * width)
        self.class_bias = nn.Linear(width, spec.classes)

    def initialize(self, std: float | None, generator: torch.Generator) -> None:
        """PyTorch's usual weights (uniform, variance 1 / (3 inputs)), the last layers' divided by `spec.shrink`, and zero biases."""
        last = (self.matrix, self.classes, self.vector, self.class_bias)
        for linear in (self.spread, self.hidden, self.vector_hidden, *last):
            nn.init.kaiming_uniform_(linear.weight, a=5**0.5, generator=generator)
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            for linear in last:
                linear.weight /= self.spec.shrink

    def filters(self, x: Float[Tensor, "k d"], rows: int, columns: int) -> Float[Tensor, "k d d rows columns"]:
        """The convolutions of nodes before tiling and scaling. Kernels larger than `spec.kernel` are the largest one, interpolated."""
        size = self.spec.kernel
        if max(rows, columns) > size:
            largest = self.filters(x, min(rows, size), min(columns, size))
            return F.interpolate(largest.flatten(0, 1), (rows, columns), mode="bilinear").unflatten(0, largest.shape[:2])
        top, left = size // 2 - rows // 2, size // 2 - columns // 2
        weight = self.spread.weight.view(4 * self.width, size, size, self.width)[:, top : top + rows, left : left + columns]
        bias = self.spread.bias.view(4 * self.width, size, size)[:, top : top + rows, left : left + columns]
        # Only the positions that are used are computed.
        places = torch.relu(torch.einsum("kd,crsd->krsc", x, weight) + bias.permute(1, 2, 0))
        made = self.matrix(torch.relu(self.hidden(places)))
        return made.unflatten(-1, (self.width, self.width)).permute(0, 3, 4, 1, 2)

    def forward(self, nodes: Float[Tensor, "b n d"], graphs: Sequence[Graph], classifier: bool = True) -> list[dict[str, Tensor]]:
        """The parameters of every graph's network by name.

        Args:
            classifier: whether the parameters that make its scores are predicted too.
        """
        wanted = [
            (i, j, p)
            for i, graph in enumerate(graphs)
            for j, node in enumerate(graph.nodes)
            for p in node.parameters
            if classifier or p.name not in graph.classifier
        ]
        groups: dict[tuple[int, int] | str, list[tuple[int, int, Parameter]]] = {}
        for i, j, p in wanted:
            scores = p.name in graphs[i].classifier and p.shape[:1] == (self.spec.classes,)
            kind: Any = "classifier" if scores else shape4(p.shape)[2:]
            if p.role != "matrix":
                kind = "class bias" if scores else "vector"
            groups.setdefault(kind, []).append((i, j, p))
        made: list[dict[str, Tensor]] = [{} for _ in graphs]
        for kind, members in groups.items():
            x = nodes[[i for i, _, _ in members], [j for _, j, _ in members]]
            for (i, j, p), raw in zip(members, self._decoded(kind, x), strict=True):
                one = raw.chunk(2)[p.role == "shift"] if kind == "vector" else raw
                positions = graphs[i].nodes[j].op == "pos_enc"
                made[i][p.name] = cut(one, p.shape) if positions else normalized(cut(one, p.shape), p.role)
        return made

    def _decoded(self, kind: Any, x: Float[Tensor, "k d"]) -> Tensor:
        if kind == "classifier":
            matrix = torch.relu(self.filters(x, 1, 1)[..., 0, 0])
            return self.classes(matrix.transpose(1, 2)).transpose(1, 2)
        if kind in ("vector", "class bias"):
            both = self.vector(torch.relu(self.vector_hidden(x)))
            return both if kind == "vector" else self.class_bias(torch.relu(both.chunk(2, dim=-1)[1]))
        return self.filters(x, *kind)


def cut(raw: Tensor, shape: torch.Size) -> Tensor:
    """`raw` repeated along every dimension that is too short, and cut, to `shape`."""
    wide = shape4(shape) if raw.dim() > 1 else (shape.numel(),)
    raw = raw[..., None, None] if raw.dim() == 2 else raw
    times = [-(-want // have) for want, have in zip(wide, raw.shape, strict=True)]
    raw = raw.repeat(times) if max(times) > 1 else raw
    return raw[tuple(slice(0, want) for want in wide)].reshape(shape)


def normalized(raw: Tensor, role: str) -> Tensor:
    """Predicted numbers at the scale that a parameter has.

    A matrix or convolution: raw sqrt(beta / fan_in), so that numbers of variance 1 become He's initialization; beta = 2, and 1 where no
    ReLU follows, which is told by the shape: one input channel (depth-wise), or fewer rows than columns (the first of a separated pair).
    A norm's gain: 2 sigmoid(raw / 2), in (0, 2). Shifts: tanh(raw / 5).
    """
    if role == "gain":
        return 2 * torch.sigmoid(raw / 2)
    if role == "shift":
        return torch.tanh(0.2 * raw)
    plain = raw.dim() > 2 and (raw.shape[1] == 1 or (raw.dim() > 3 and raw.shape[2] < raw.shape[3]))
    fan_in = max(raw[0].numel(), 1) if raw.dim() > 1 else 1
    return raw * ((1 if plain else 2) / fan_in) ** 0.5


def predict(ghn: Any, graphs: Sequence[Graph], *, classifier: bool = True) -> list[dict[str, Tensor]]:
    """All parameters of the networks that the graphs describe, by name, with gradients into the hypernetwork.

    Args:
        ghn: a model with an embedding of kind graph and a head of kind parameters.
        classifier: predict what makes the scores too. Otherwise it is read as if it had the classes that the hypernetwork was trained on,
            which is how networks for other classes are started.
    """
    hidden = ghn(graph_batch(graphs, ghn.device, None if classifier else ghn.head.spec.classes)).hidden
    return ghn.head(hidden, graphs, classifier)


def with_noise(parameters: dict[str, Tensor], share: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Matrices with a little noise, so that channels that tiling made equal can part. Its standard deviation is `share` times that of the
    correlations between output channels; where there is only one, times that of the weights."""
    return {name: p + share * _unlike(p) * _normal(p, generator) if p.dim() > 1 else p for name, p in parameters.items()}


def _unlike(p: Tensor) -> Tensor:
    rows = p.detach().flatten(1)
    if min(rows.shape) < 2:
        return rows.std(correction=0)
    rows = F.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1)
    return (rows @ rows.T).std(correction=0)


def _normal(p: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(p.shape, generator=generator, device=generator.device, dtype=p.dtype).to(p.device)
