"""The self-contained page about a run."""

from layerwise.report.page import write_inspect_page, write_report

__all__ = ["write_inspect_page", "write_report"]
