"""What `layerwise` offers from Python besides models: running jobs and preparing data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from layerwise.complaint import parsed
from layerwise.data.load import Data, load_data
from layerwise.data.spec import DataSpec
from layerwise.jobs.cache import cache_folder
from layerwise.jobs.catalogue import find
from layerwise.jobs.receipt import Receipt
from layerwise.jobs.run import run_job
from layerwise.jobs.schema import Scale, read_job


def run(
    job: str | Path | dict[str, Any],
    out: str | Path,
    *,
    scale: Scale | None = None,
    settings: dict[str, Any] | None = None,
    data_dir: str | Path | None = None,
    device: str = "cpu",
) -> Receipt:
    """Run a system by name, a job file or a job as plain data into the new folder `out`.

    Args:
        settings: dotted path -> value, as `--set` on the command line.
    """
    source = job if isinstance(job, dict) else find(str(job))
    read = read_job(source, scale=scale, settings=settings)
    return run_job(read, Path(out), data_dir=Path(data_dir) if data_dir else None, device=device)


def prepared(source: str = "builtin:docs", *, data_dir: str | Path | None = None, **options: Any) -> Data:
    """Prepared data: `layerwise.load_data("builtin:docs", length=128)`.

    Options are the fields of `layerwise.data.spec.DataSpec`, as plain data (`tokenizer={"kind": "bytes"}`) or as specs.
    """
    spec = parsed(TypeAdapter(DataSpec), {"source": source, **options}, "load_data")
    return load_data(spec, Path(data_dir) if data_dir else None, cache_folder())
