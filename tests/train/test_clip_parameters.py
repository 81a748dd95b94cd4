"""Card 108, check 8: clipping the gates touches no other gradient."""

import types

import pytest
import torch

from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.train.policies.clip import ClipParameters


def _run(**layer):
    data = preset("decoder") | {"embedding": {"vocab": 64}}
    data["stack"] |= {"depth": 3, "width": 16}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    model = build(model_spec(data))
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    return types.SimpleNamespace(model=model)


def test_only_the_gates_are_clipped_and_together():
    run = _run(stream_gate="gpas")
    before = {n: p.grad.clone() for n, p in run.model.named_parameters()}
    policy = ClipParameters(norm=0.01)
    policy.start(run)
    policy.after_backward(run)
    after = {n: p.grad for n, p in run.model.named_parameters()}
    gates = [n for n in after if n.endswith("gate.alpha")]
    assert len(gates) == 3 and all(torch.equal(before[n], after[n]) for n in after if n not in gates)
    a, b = (torch.stack([g[n] for n in gates]) for g in (after, before))
    torch.testing.assert_close(a.norm(), torch.tensor(0.01), rtol=1e-3, atol=0)
    torch.testing.assert_close(a / a.norm(), b / b.norm())


def test_nothing_to_clip_is_said():
    with pytest.raises(BadInput, match="no parameter's name ends in 'gate.alpha'"):
        ClipParameters().start(_run())
    with pytest.raises(BadInput, match="positive"):
        ClipParameters(norm=0.0)
