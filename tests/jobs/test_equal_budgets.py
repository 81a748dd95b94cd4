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
