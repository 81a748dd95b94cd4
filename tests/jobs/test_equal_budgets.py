"""Arms that a job calls equal in parameters or bytes are, at every scale that claims something."""

from __future__ import annotations

import pytest
import torch

from layerwise.jobs.catalogue import find
from layerwise.jobs.schema import Scale, read_job
from layerwise.models.model import Model


def _model(system: str, scale: Scale, arm: str) -> Model:
    spec = read_job(find(system), scale=scale).plans()[arm].model
    with torch.device("meta"):
        return Model(spec.with_vocab(259))  # type: ignore[union-attr]


@pytest.mark.parametrize("scale", ["tiny", "mini", "small", "full"])
def test_sltrain_and_low_rank_have_as_many_parameters(scale: Scale) -> None:
    method, baseline = (sum(p.numel() for p in _model("sltrain", scale, arm).stack.parameters()) for arm in ("sltrain", "low-rank"))
    assert baseline == pytest.approx(method, rel=0.01)


@pytest.mark.parametrize("scale", ["small", "full"])
@pytest.mark.parametrize("arm", ["lora-equal-bytes", "relora-equal-bytes"])
def test_loqt_and_adapters_of_equal_bytes_store_and_train_as_much(scale: Scale, arm: str) -> None:
    def layers(name: str) -> int:
        stack = _model("loqt", scale, name).stack
        stored = sum(t.numel() * t.element_size() for t in (*stack.parameters(), *stack.buffers()))
        # A gradient and Adam's two moments.
        return stored + sum(3 * p.numel() * p.element_size() for p in stack.parameters() if p.requires_grad)

    assert layers(arm) == pytest.approx(layers("loqt"), rel=0.01)
