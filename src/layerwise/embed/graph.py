"""Nodes of a computational graph as vectors, and its edges as a bias on attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from layerwise.embed.spec import GraphSpec
from layerwise.nn.positions import sinusoids

PRIMITIVES = (
    "max_pool", "avg_pool", "sep_conv", "dil_conv", "conv", "msa", "cse", "sum", "concat", "input", "bias", "bn", "ln", "pos_enc", "glob_avg",
)  # fmt: skip
"""What a node can be. A linear map is a convolution with a 1x1 kernel."""
CHANNELS = (1, 3, *range(8, 64, 8), *range(64, 4096, 16), *range(4096, 8193, 32))
"""Numbers of channels that have a vector of their own, beside the number of classes; others take the nearest one's."""
KERNELS = (1, 3, 5, 7, 9, 11, 14, 16)
EDGE_ROWS = 257
DEGREES, DISTANCES = 100, 1000
"""In- and out-degrees, and distances from the input, are clipped there."""


def nearest_bin(sizes: Int[Tensor, "*b"], bins: tuple[int, ...]) -> Int[Tensor, "*b"]:
    """1 + the index of the nearest bin (the lower of two), 0 for a node without parameters."""
    table = torch.tensor(bins, device=sizes.device)
    found = (sizes[..., None] - table).abs().argmin(dim=-1) + 1
    return found.masked_fill(sizes == 0, 0)


class GraphEmbedding(nn.Module):
    """What a node does, the shape of its parameters, its degrees and its distance from the input: (b, nodes, width).

    Reads what `layerwise.models.graph.graph_batch` makes. Node features are Embedding(op) plus four vectors of width / 4, of output
    and input channels (from one table) and the kernel's rows and columns (from another), side by side; plus vectors of the degrees (real edges only) and of the
    length of the shortest path from node 0, the input.

    Source: Knyazev, Hwang and Lacoste-Julien 2023, "Can We Scale Transformers to Predict Parameters of Diverse ImageNet Models?"
    (GHN-3), section 3 and its published code; Ying et al. 2021, "Do Transformers Really Perform Bad for Graph Representation?".

    Args:
        width: of the stack, a multiple of 4. heads: of its attention. classes: a number of channels with a vector of its own.
    """

    def __init__(self, spec: GraphSpec, width: int, heads: int, classes: int | None) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self.bins = tuple(sorted({*CHANNELS, *([classes] if classes else [])}))
        self.op = nn.Embedding(len(PRIMITIVES), width)
        self.channels = nn.Embedding(len(self.bins) + 1, width // 4)
        self.kernels = nn.Embedding(len(KERNELS) + 1, width // 4)
        self.in_degree, self.out_degree = nn.Embedding(DEGREES + 1, width), nn.Embedding(DEGREES + 1, width)
        self.distance = nn.Embedding(DISTANCES + 1, width)
        self.edge = nn.Embedding(EDGE_ROWS, width, padding_idx=0)
        self.edge_hidden, self.edge_out = nn.Linear(2 * width, width), nn.Linear(width, heads)

    def forward(self, batch: Mapping[str, Any], positions: Tensor | None = None) -> Float[Tensor, "b n width"]:
        """`graph_ops` (b, n), `graph_sizes` (b, n, 4) and `graph_paths` (b, n, n), lengths of shortest paths, 0 where there is none."""
        sizes = batch["graph_sizes"]
        channels = self.channels(nearest_bin(sizes[..., :2], self.bins))
        kernels = self.kernels(nearest_bin(sizes[..., 2:], KERNELS))
        shape = torch.cat([channels.flatten(-2), kernels.flatten(-2)], dim=-1)
        edges = batch["graph_paths"] == 1
        into, out = (edges.sum(dim=d).clamp(max=DEGREES) for d in (1, 2))
        # How far a node is from the input is known whether or not the path is a virtual edge.
        far = batch["graph_paths"][:, 0].clamp(max=DISTANCES)
        return self.op(batch["graph_ops"]) + shape + self.in_degree(into) + self.out_degree(out) + self.distance(far)

    def edge_bias(self, batch: Mapping[str, Any]) -> Float[Tensor, "b heads n n"]:
        """What the (virtual) edge from a node to another and the one back add to their attention score, the same in every layer."""
        paths = batch["graph_paths"]
        paths = paths.masked_fill(paths > self.spec.cutoff, 0)
        pairs = torch.stack([paths, paths.transpose(1, 2)], dim=-1) + 2
        return self.edge_out(torch.relu(self.edge_hidden(self.edge(pairs).flatten(-2)))).permute(0, 3, 1, 2)

    def initialize(self, std: float | None, generator: torch.Generator) -> None:
        """Truncated normal vectors of standard deviation width^-1/2; the edges' are sinusoids, that of row 0 zero."""
        spread = self.width**-0.5
        for table in (self.op, self.channels, self.kernels, self.in_degree, self.out_degree, self.distance):
            nn.init.trunc_normal_(table.weight, std=spread, a=-2 * spread, b=2 * spread, generator=generator)
        with torch.no_grad():
            self.edge.weight.copy_(sinusoids(torch.arange(EDGE_ROWS, device=self.edge.weight.device), self.width))
            self.edge.weight[0].zero_()
        for linear in (self.edge_hidden, self.edge_out):
            nn.init.kaiming_uniform_(linear.weight, a=5**0.5, generator=generator)
            nn.init.zeros_(linear.bias)
