"""GHN-3: tracing, and the exact checks of card 054."""

import dataclasses
import json
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import layerwise as lw
from layerwise.embed.graph import CHANNELS, nearest_bin
from layerwise.errors import BadInput
from layerwise.models.architectures import distinct
from layerwise.models.ghn import cut, normalized, predict, with_noise
from layerwise.models.graph import Graph, Node, graph_batch, shape4, shortest_paths, trace
from layerwise.models.model import build
from layerwise.models.presets import PRESETS, preset
from layerwise.models.spec import model_spec
from layerwise.models.targets import Target, target_of


def _ghn(width=16, kernel=5, seed=0, **embedding):
    layer = {"heads": 4, "position": "graph", "norm": "layernorm", "ffn": "gelu", "ffn_width": 4 * width}
    spec = {
        "embedding": {"kind": "graph", "channels": 1, "size": [8, 8], **embedding},
        "stack": {"depth": 2, "width": width, "init_std": 0.3, "layer": layer},
        "head": {"kind": "parameters", "classes": 10, "kernel": kernel},
    }
    return build(model_spec(spec), seed).eval()


def _architectures(count=4, seed=0):
    return distinct(count, torch.Generator().manual_seed(seed), channels=1, size=(8, 8), classes=10)


class Foreign(nn.Module):
    """Plain PyTorch with what the sampler does not have."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, (1, 7), padding=(0, 3), bias=False)
        self.norm = nn.GroupNorm(4, 24)
        self.wise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.wide = nn.Conv2d(24, 40, 3, padding=2, dilation=2)
        self.places = nn.Parameter(torch.zeros(1, 40, 8, 8))
        self.out = nn.Linear(80, 7)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.avg_pool2d(self.wide(x + self.wise(x)) + self.places, 2)
        return self.out(torch.cat([x.mean((2, 3)), F.adaptive_avg_pool2d(x, 1).flatten(1)], dim=1))


def test_a_plain_network_is_read_operation_by_operation() -> None:
    graph = trace(Foreign(), torch.zeros(2, 3, 8, 8))
    ops = [node.op for node in graph.nodes]
    assert ops == [
        "input", "conv", "ln", "sep_conv", "bias", "sum", "dil_conv", "bias", "pos_enc", "avg_pool", "glob_avg", "glob_avg", "concat", "conv", "bias",
    ]  # fmt: skip
    assert graph.nodes[5].inputs == (2, 4)
    assert graph.nodes[12].inputs == (10, 11)
    assert graph.nodes[1].size == (24, 3, 1, 7)
    assert [p.role for p in graph.nodes[2].parameters] == ["gain", "shift"]
    assert graph.classifier == {"out.weight", "out.bias"}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_network_of_ours_is_traced_whole(name: str) -> None:
    """Check 1, for the graph: each parameter belongs to exactly one node, with its shape."""
    data = preset(name)
    kind = data.get("embedding", {}).get("kind", "tokens")
    data["embedding"] = {**data.get("embedding", {}), **({"vocab": 50} if kind == "tokens" else {"channels": 3, "size": [32, 32]})}
    if kind != "tokens":
        data["head"]["classes"] = 10
    if isinstance(data["stack"].get("layers"), list):
        data["stack"]["inputs"] = 3072 if data["embedding"].get("flatten") else 3
    else:
        data["stack"]["depth"] = 2
    model = build(model_spec(data))
    training, before = model.training, {n: t.clone() for n, t in model.state_dict().items()}
    graph = trace(model)
    assert sum(len(node.parameters) for node in graph.nodes) == len(graph.parameters)
    assert graph.parameters == {name: p.shape for name, p in model.named_parameters()}
    assert graph.nodes[0].op == "input"
    assert all(i < j for j, node in enumerate(graph.nodes) for i in node.inputs)
    assert model.training == training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())  # batch norms have not counted the example


def test_what_cannot_be_traced_is_refused_with_the_reason() -> None:
    class Branch(nn.Linear):
        def forward(self, x):
            return x if x.sum() > 0 else super().forward(x)

    with pytest.raises(BadInput, match="Branch cannot be traced"):
        trace(Branch(2, 2), torch.zeros(1, 2))
    with pytest.raises(BadInput, match="example of its inputs"):
        trace(nn.Linear(2, 2))


def test_every_parameter_has_its_exact_shape() -> None:
    """Check 1: all tensors, exact shapes, and as many numbers as the network has."""
    ghn = _ghn()
    foreign = Foreign()
    foreign.out = nn.Linear(80, 10)
    graphs = [target_of(spec).graph for spec in _architectures()] + [trace(foreign, torch.zeros(2, 3, 8, 8))]
    networks = [*(build(spec) for spec in _architectures()), foreign]
    for network, made in zip(networks, predict(ghn, graphs), strict=True):
        assert {n: t.shape for n, t in made.items()} == {n: p.shape for n, p in network.named_parameters()}
        assert sum(t.numel() for t in made.values()) == sum(p.numel() for p in network.parameters())
        assert all(torch.isfinite(t).all() for t in made.values())


def test_wide_matrices_are_tiled_and_kernels_are_the_centre() -> None:
    """Check 2."""
    d = 8
    raw = torch.randn(d, d, 1, 1)
    wide = cut(raw, torch.Size([2 * d, 3 * d, 1, 1]))
    assert torch.equal(wide[d:], wide[:d])
    assert torch.equal(wide[:, :d], wide[:, 2 * d :])
    assert torch.equal(wide[:d, :d], raw)
    head = _ghn(width=8, kernel=16).head
    x = torch.randn(3, 8)
    whole, part = head.filters(x, 16, 16), head.filters(x, 3, 3)
    torch.testing.assert_close(part, whole[..., 7:10, 7:10])
    torch.testing.assert_close(head.filters(x, 1, 5), whole[..., 8:9, 6:11])


def test_fan_in_sets_the_variance() -> None:
    """Check 3: numbers of variance 1 get variance 2 / fan_in, and 1 / fan_in where no ReLU follows."""
    generator = torch.Generator().manual_seed(0)
    for shape, beta in (((64, 32, 3, 3), 2), ((256, 128), 2), ((4096, 1, 3, 3), 1), ((128, 32, 1, 7), 1), ((128, 32, 7, 1), 2)):
        made = normalized(torch.randn(shape, generator=generator), "matrix")
        fan_in = made[0].numel()
        assert made.var().item() == pytest.approx(beta / fan_in, rel=0.05)


def test_gains_and_shifts_are_bounded() -> None:
    """Check 4."""
    raw = torch.tensor([-20.0, -1.0, 0.0, 1.0, 20.0], dtype=torch.float64)
    gain, shift = normalized(raw, "gain"), normalized(raw, "shift")
    assert gain[2] == 1
    assert shift[2] == 0
    assert (gain > 0).all() and (gain < 2).all()
    assert (shift.abs() < 1).all()


def _relabelled(graph: Graph, order: list[int]) -> Graph:
    """The same graph with its nodes in another order: node i is what order[i] was."""
    place = {old: new for new, old in enumerate(order)}
    nodes = [dataclasses.replace(graph.nodes[old], inputs=tuple(place[i] for i in graph.nodes[old].inputs)) for old in order]
    paths = graph.paths()
    index = torch.tensor(order)
    return Graph(nodes, graph.classifier, {50: paths[index][:, index]})


def test_relabelled_nodes_get_the_same_parameters() -> None:
    """Check 5: any order of the nodes, the input first, with the paths in that order."""
    ghn = _ghn().double()
    graph = target_of(_architectures(6)[5]).graph
    order = [0, *(torch.randperm(len(graph.nodes) - 1, generator=torch.Generator().manual_seed(1)) + 1).tolist()]
    (a,), (b,) = predict(ghn, [graph]), predict(ghn, [_relabelled(graph, order)])
    assert order != sorted(order)
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_a_graph_in_a_padded_batch_is_as_alone() -> None:
    """Check 6."""
    ghn = _ghn().double()
    graphs = [target_of(spec).graph for spec in _architectures(5)]
    assert len({len(g.nodes) for g in graphs}) > 1
    for graph, together in zip(graphs, predict(ghn, graphs), strict=True):
        (alone,) = predict(ghn, [graph])
        for name in alone:
            torch.testing.assert_close(together[name], alone[name])


@pytest.mark.parametrize("cutoff", [50, 3])
def test_paths_are_those_of_networkx(cutoff: int) -> None:
    """Check 7: virtual edges are all-pairs shortest paths with a cutoff; upper triangular in topological order."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.rand(70, 70, generator=generator) < 0.03).triu(1) | torch.diag(torch.ones(69), 1).bool()
    chain = torch.diag(torch.ones(79), 1).bool()
    for edges in (drawn, chain, trace(Foreign(), torch.zeros(2, 3, 8, 8)).edges):
        found = shortest_paths(edges, cutoff)
        expected = torch.zeros_like(found)
        for i, lengths in nx.all_pairs_shortest_path_length(nx.from_numpy_array(edges.numpy(), create_using=nx.DiGraph), cutoff=cutoff):
            for j, length in lengths.items():
                expected[i, j] = length
        assert torch.equal(found, expected)
        assert torch.equal(found, found.triu(1))
        assert torch.equal(found == 1, edges)


def test_gradient_reaches_the_hypernetwork_through_the_target() -> None:
    """Check 8: equals finite differences on a target of two layers, which owns no parameters that could learn."""
    ghn = _ghn(width=8, kernel=3).double()
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    target = Target.of(network, torch.zeros(2, 1, 6, 6))
    assert not any(p.requires_grad or p.device.type != "meta" for p in target.network.parameters())
    batch = {"pixel_values": torch.randn(5, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}
    labels = torch.arange(5)

    def loss() -> torch.Tensor:
        return F.cross_entropy(target(predict(ghn, [target.graph])[0], batch), labels)

    loss().backward()
    for name in ("embedding.op.weight", "embedding.edge_out.weight", "stack.layers.0.mixer.branch.q.weight", "head.spread.weight", "head.vector.bias", "head.classes.weight"):  # fmt: skip
        parameter = ghn.get_parameter(name)
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        k = parameter.grad.abs().argmax()
        with torch.no_grad():
            step, here = 1e-5, parameter.view(-1)[k].item()
            parameter.view(-1)[k] = here + step
            above = loss()
            parameter.view(-1)[k] = here - step
            below = loss()
            parameter.view(-1)[k] = here
        assert parameter.grad.view(-1)[k].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-4), name


def test_the_prediction_is_what_the_network_computes_with_it() -> None:
    ghn, spec = _ghn(), _architectures()[0]
    target, model = target_of(spec), build(spec).train()
    (made,) = predict(ghn, [target.graph])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(made[name])
    batch = {"pixel_values": torch.rand(6, 1, 8, 8)}
    torch.testing.assert_close(target(made, batch), model(batch).logits)


def test_without_virtual_edges_only_real_ones_act_and_a_window_of_one_sees_no_graph() -> None:
    graph = target_of(_architectures()[0]).graph
    batch = graph_batch([graph])
    real = {**batch, "graph_paths": batch["graph_paths"].masked_fill(batch["graph_paths"] > 1, 0)}
    near, far = _ghn(cutoff=1), _ghn()
    assert torch.equal(near.embedding.edge_bias(batch), near.embedding.edge_bias(real))
    assert not torch.equal(far.embedding.edge_bias(batch), far.embedding.edge_bias(real))
    spec = dataclasses.replace(
        far.spec, stack=dataclasses.replace(far.spec.stack, layer=dataclasses.replace(far.spec.stack.layer, window=1))
    )
    alone = build(spec, 0).eval()
    other = {**batch, "graph_ops": batch["graph_ops"].clone()}
    other["graph_ops"][0, 3] = 2
    changed = (alone(batch).hidden != alone(other).hidden).any(dim=-1)[0].nonzero()[:, 0].tolist()
    assert changed == [3]
    assert (far(batch).hidden != far(other).hidden).any(dim=-1)[0].sum() > 1


def test_noise_parts_equal_channels_and_stays_small() -> None:
    wide = cut(torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0)), torch.Size([8, 4, 3, 3]))
    noisy = with_noise({"w": wide, "b": torch.zeros(8)}, 1e-5, torch.Generator().manual_seed(0))
    assert not torch.equal(noisy["w"][:4], noisy["w"][4:])
    assert (noisy["w"] - wide).abs().max() < 1e-4
    assert torch.equal(noisy["b"], torch.zeros(8))


def test_without_noise_channels_that_tiling_made_equal_stay_equal() -> None:
    """The card's trap: in a plain network equal channels have equal gradients for ever; noise parts them."""
    ghn = _ghn(width=8, kernel=3)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    target = Target.of(network, torch.zeros(2, 1, 8, 8))
    batch = {"pixel_values": torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    labels = torch.arange(20) % 10
    apart = []
    for noise in (0.0, 1e-2):
        start = with_noise(predict(ghn, [target.graph])[0], noise, torch.Generator().manual_seed(0))
        weights = {name: p.detach().double().requires_grad_() for name, p in start.items()}
        optimizer = torch.optim.SGD(list(weights.values()), lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(target(weights, {"pixel_values": batch["pixel_values"].double()}), labels).backward()
            optimizer.step()
        apart.append((weights["0.weight"][:8] - weights["0.weight"][8:]).abs().max().item())
    assert apart[0] < 1e-12
    assert apart[1] > 1e-5


def test_sizes_go_to_the_nearest_bin() -> None:
    sizes = torch.tensor([0, 1, 2, 3, 10, 13, 90000])
    assert nearest_bin(sizes, CHANNELS).tolist() == [0, 1, 1, 2, 3, 4, len(CHANNELS)]
    with_classes = _ghn().embedding.bins
    assert nearest_bin(sizes, with_classes).tolist() == [0, 1, 1, 2, 4, 4, len(CHANNELS) + 1]
    assert shape4((1, 40, 8, 8)) == (1, 40, 8, 8)
    assert [shape4(s) for s in ((7,), (7, 5), (1, 9, 6), (7, 5, 3), ())] == [
        (7, 1, 1, 1),
        (7, 5, 1, 1),
        (9, 6, 1, 1),
        (7, 5, 1, 3),
        (1, 1, 1, 1),
    ]


def test_architectures_differ_and_follow_the_generator() -> None:
    specs = _architectures(30)
    assert len(set(specs)) == 30
    assert specs == _architectures(30)
    assert not set(distinct(10, torch.Generator().manual_seed(0), but=set(specs), channels=1, size=(8, 8), classes=10)) & set(specs)
    layers = [layer for spec in specs for layer in spec.stack.layers]
    assert {layer.kind for layer in layers} == {"conv", "residual"}
    assert {layer.size for layer in layers} == {1, 3, 5}
    assert {layer.norm for layer in layers} == {"batch", "none"}


def test_edit_gives_a_model_predicted_weights(tmp_path) -> None:
    ghn = _ghn()
    lw.save(ghn, tmp_path / "ghn")
    model = build(_architectures()[1], 5)
    new = lw.edit.ghn_initialize(model, ghn=str(tmp_path / "ghn"), noise=0.0)
    (made,) = predict(ghn, [trace(model)])
    for name, parameter in new.named_parameters():
        torch.testing.assert_close(parameter, made[name])
    kept = lw.edit.ghn_initialize(model, ghn=str(tmp_path / "ghn"), classifier=False)
    assert torch.equal(kept.head.out.weight, model.head.out.weight)
    assert not torch.equal(kept.stack.layers[0].weight.weight, model.stack.layers[0].weight.weight)
    lw.save(model, tmp_path / "other")
    with pytest.raises(BadInput, match="no graph hypernetwork"):
        lw.edit.ghn_initialize(model, ghn=str(tmp_path / "other"))


def test_without_its_classifier_a_network_for_other_classes_gets_the_same_weights() -> None:
    ghn, spec = _ghn(), _architectures()[0]
    other = dataclasses.replace(spec, head=dataclasses.replace(spec.head, classes=37))
    (ours,), (theirs,) = (predict(ghn, [target_of(s).graph], classifier=False) for s in (spec, other))
    assert ours.keys() == theirs.keys() == {n for n in target_of(spec).graph.parameters if not n.startswith("head.")}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    (whole,) = predict(ghn, [target_of(other).graph])
    assert whole["head.out.weight"].shape[0] == 37


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": {"kind": "tokens"}, "stack": {"depth": 1, "width": 16}}, "embedding.kind to graph"),
        ({"stack": {"depth": 1, "width": 16, "layer": {"position": "none"}}}, "position to graph"),
        ({"head": {"kind": "classifier", "classes": 3}}, "head.kind to parameters"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(change, message: str) -> None:
    spec = {
        "embedding": {"kind": "graph"},
        "stack": {"depth": 1, "width": 16, "layer": {"position": "graph"}},
        "head": {"kind": "parameters", "classes": 3},
    }
    with pytest.raises(ValueError, match=message):
        model_spec({**spec, **change})


def test_nodes_without_parameters_have_no_size() -> None:
    assert Node("sum", (1, 2)).size == (0, 0, 0, 0)


def _wave(parameter, k: int, rise: float = 0.0) -> None:
    numbers = torch.arange(parameter.numel(), dtype=torch.float64)
    parameter.copy_((0.3 * torch.sin(0.7 * numbers + k)).view(parameter.shape) + rise)


def _wave_attention(layer, k: int) -> int:
    """The weights of the golden numbers, in the order of the published module; returns the next k."""
    attention = layer.mixer.branch
    _wave(layer.mixer.norm.weight, k, 1.0), _wave(layer.mixer.norm.bias, k + 1)
    qkv = torch.empty(3 * attention.o.weight.shape[0], attention.o.weight.shape[0], dtype=torch.float64)
    _wave(qkv, k + 2)
    for linear, part in zip((attention.q, attention.k, attention.v), qkv.chunk(3), strict=True):
        linear.weight.copy_(part)
    _wave(attention.o.weight, k + 3), _wave(attention.o.bias, k + 4)
    return k + 5


def _wave_ffn(layer, k: int) -> int:
    for i, parameter in enumerate((layer.ffn.norm.weight, layer.ffn.norm.bias, layer.ffn.branch.up.weight, layer.ffn.branch.up.bias, layer.ffn.branch.down.weight, layer.ffn.branch.down.bias)):  # fmt: skip
        _wave(parameter, k + i, float(i == 0))
    return k + 6


@torch.no_grad()
def test_nodes_and_filters_are_those_of_the_published_code() -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden" / "ghn3.json").read_text())
    layer = {"heads": 2, "position": "graph", "norm": "layernorm", "norm_eps": 1e-5, "ffn": "gelu", "ffn_width": 32, "out_bias": True, "ffn_bias": True}  # fmt: skip
    spec = {
        "embedding": {"kind": "graph"},
        "stack": {"depth": 2, "width": 8, "layer": layer},
        "head": {"kind": "parameters", "classes": 3, "kernel": 6},
    }
    ghn = build(model_spec(spec), 0).double().eval()
    first, second = ghn.stack.layers
    embedding, head = ghn.embedding, ghn.head
    k = _wave_attention(first, 0)
    for i, p in enumerate((embedding.edge.weight, embedding.edge_hidden.weight, embedding.edge_hidden.bias, embedding.edge_out.weight, embedding.edge_out.bias)):  # fmt: skip
        _wave(p, k + i)
    k = _wave_ffn(first, k + 5)
    for i, table in enumerate((embedding.in_degree, embedding.out_degree, embedding.distance)):
        _wave(table.weight, k + i)
    k = _wave_ffn(second, _wave_attention(second, k + 3))
    _wave(ghn.stack.norm.weight, k), _wave(ghn.stack.norm.bias, k + 1)
    _wave(embedding.op.weight, 100)
    embedding.channels.weight.zero_(), embedding.kernels.weight.zero_()
    for i, linear in enumerate((head.spread, head.hidden, head.matrix, head.classes)):
        _wave(linear.weight, 200 + 2 * i), _wave(linear.bias, 201 + 2 * i)
    ops = ("input", "conv", "bn", "conv", "sum", "glob_avg", "conv")
    inputs = ((), (0,), (1,), (2,), (2, 3), (4,), (5,))
    nodes = ghn(graph_batch([Graph([Node(op, i) for op, i in zip(ops, inputs, strict=True)])])).hidden
    expected = {name: torch.tensor(golden[name], dtype=torch.float64) for name in ("nodes", "filters", "large", "classes")}
    torch.testing.assert_close(nodes.flatten(), expected["nodes"], rtol=1e-9, atol=1e-9)
    chosen = nodes[0, [1, 3]]
    torch.testing.assert_close(head.filters(chosen, 3, 3)[:, ::3, ::3].flatten(), expected["filters"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(head.filters(chosen[:1], 7, 7)[:, ::4, ::4].flatten(), expected["large"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(head._decoded("classifier", chosen).flatten(), expected["classes"], rtol=1e-9, atol=1e-9)
