"""Cards 031 and 108: three layers of every norm scheme compute what the published code of GPAS (built on Mix-LN's) computes."""

import json
from pathlib import Path

import pytest
import torch

from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.stack.context import Context

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "norm_schemes.json").read_text())
OURS = {"deeppost": "deepnorm"}
ROLES = ["mixer.branch.q", "mixer.branch.k", "mixer.branch.v", "mixer.branch.o", "ffn.branch.gate", "ffn.branch.up", "ffn.branch.down"]


@pytest.mark.parametrize("scheme", [name for name in GOLDEN if name != "source"])
def test_outputs_and_gradients_of_the_published_code(scheme):
    """`post_pre` is Mix-LN with one layer of three. Weights, gates, inputs and the loss are formulas."""
    placement, gated = scheme.removesuffix("_gpas"), scheme.endswith("_gpas")
    data = preset("decoder") | {"embedding": {"vocab": 4}, "head": None}
    layer = data["stack"]["layer"] | {"heads": 2, "ffn_width": 24, "norm_eps": 1e-6, "stream_gate": "gpas" if gated else None}
    mixed = placement == "post_pre"
    layer["placement"] = "pre" if mixed else OURS.get(placement, placement)
    overrides = {"0:1": {"placement": "post"}} if mixed else {}
    data["stack"] = {"depth": 3, "width": 16, "final_norm": False, "layer": layer, "overrides": overrides}
    stack = build(model_spec(data)).double().stack
    for i, each in enumerate(stack.layers):
        for j, role in enumerate(ROLES):
            weight = each.get_submodule(role).weight
            weight.data = (0.3 * torch.sin(torch.arange(weight.numel()).double() ** 2 * 0.013 + j + i)).view(weight.shape)
        if gated:
            each.gate.alpha.data.fill_(0.4 * (i + 1) - 0.6)
    x = (torch.cos(torch.arange(2 * 5 * 16).double() * 0.7) * 2).view(2, 5, 16).requires_grad_()
    out = stack(x, Context(positions=torch.arange(5)[None]))
    (out * torch.sin(torch.arange(out.numel()).double() * 0.9).view(out.shape)).sum().backward()
    made = {
        "out": out[1, 4, :4],
        "x_grad": x.grad[0, 0, :4],
        "q_grad": stack.layers[0].mixer.branch.q.weight.grad.norm(),
        "down_grad": stack.layers[2].ffn.branch.down.weight.grad.norm(),
    }
    if gated:
        made["gate_grad"] = torch.stack([each.gate.alpha.grad for each in stack.layers])
    for name, value in made.items():
        torch.testing.assert_close(value.detach(), torch.tensor(GOLDEN[scheme][name], dtype=torch.float64), rtol=2e-5, atol=2e-5)
