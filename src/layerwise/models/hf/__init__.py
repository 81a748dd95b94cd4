"""Hugging Face checkpoints in and out, one file per family."""

from layerwise.models.hf.folder import export_hf, import_hf
from layerwise.models.hf.table import FAMILIES, family_for

__all__ = ["FAMILIES", "export_hf", "family_for", "import_hf"]
