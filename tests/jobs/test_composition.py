"""Every pair of norms, linears, optimizers and policies trains or is refused with a reason, as docs/composition.md says."""

from pathlib import Path

import pytest

from layerwise.jobs.composition import AXES, outcomes, page, small_data
from layerwise.train.policies import POLICIES


@pytest.mark.slow
def test_every_pair_trains_or_is_refused_as_the_page_says():
    found = outcomes(small_data())
    assert page(found) == (Path(__file__).resolve().parents[2] / "docs" / "composition.md").read_text(), (
        "run python -m layerwise.jobs.composition"
    )
    whole = [reason for table in found.values() for reason in table.values()]
    assert sum(reason is None for reason in whole) > 0.7 * len(whole)
    assert all(reason and len(reason) > 20 for reason in whole if reason is not None)


def test_the_axes_name_what_there_is():
    assert set(AXES["policies"]) - {"none"} <= set(POLICIES)
