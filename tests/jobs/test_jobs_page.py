"""docs/jobs.md has a row for everything that a job can name, and each row has all of its options."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from layerwise.jobs.schema import TABLES
from layerwise.table import lookup
from layerwise.train.policies import POLICIES

ROWS = [line for line in (Path(__file__).resolve().parents[2] / "docs" / "jobs.md").read_text().splitlines() if line.startswith("|")]
NAMED = [(kind, name) for kind, table in {**TABLES, "policy": POLICIES}.items() for name in table]


@pytest.mark.parametrize(("kind", "name"), NAMED)
def test_what_a_job_can_name_has_a_row_with_its_options(kind: str, name: str) -> None:
    function = lookup(POLICIES if kind == "policy" else TABLES[kind], name, kind)
    options = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    said = name if kind in ("train", "policy") else f"{kind}: {name}"
    rows = [row for row in ROWS if f"`{said}`" in row.split("|")[1]]
    assert rows, f"docs/jobs.md has no row of `{said}`"
    rows += [row for row in ROWS if "as `quantize`" in "".join(rows) and "`edit: quantize`" in row.split("|")[1]]
    missing = [o for o in options if not any(re.search(rf"`{o}`", row) for row in rows)]
    assert not missing, f"docs/jobs.md: the row of `{said}` lacks {missing}"
