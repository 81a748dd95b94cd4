"""What quantization does to the residual stream, layer after layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from layerwise.analyze.findings import Cell, Findings, Table
from layerwise.edit.quantization.engine import quantized_layers, recipe_of
from layerwise.edit.quantization.quantize import preview_quantize
from layerwise.edit.quantization.rotation import Rotation
from layerwise.edit.quantization.rotation import rotate as turn
from layerwise.edit.quantization.scaling import Clip, Scale
from layerwise.edit.quantization.tokens import Tokens
from layerwise.models.model import Model


def quantization_error(
    model: Model,
    data: Any,
    *,
    bits: int | Sequence[int] = 4,
    method: Literal["rtn", "gptq"] = "gptq",
    group: int | None = None,
    symmetric: bool = False,
    clip: Clip = False,
    act_order: bool = False,
    damping: float = 0.01,
    rotate: Rotation | None = None,
    scale: Scale | None = None,
    propagate: float = 0.0,
    propagate_damping: float = 1.0,
    propagate_down: bool = False,
    tokens: Tokens | None = None,
    floor: float = 0.01,
    exponent: float = 1.0,
    shifts: int = 1,
    samples: int = 64,
    batch: int = 8,
    split: str = "train",
    spill: bool = False,
    seed: int | None = None,
) -> Findings:
    """Squared error of the stream that leaves each layer, over its squared norm, when this and all layers below are quantized.

    The options are those of the edit `quantize`; the model stays as it is. A rotation turns both streams, which leaves the distance between
    them. Metrics: `stream_error`, behind the last layer.
    Source of the curve: Arai and Ichikawa 2025, "Quantization Error Propagation" (arXiv 2504.09629), figure 2.
    """
    options = {k: v for k, v in locals().items() if k not in ("model", "data")}
    preview_quantize(model.spec, **options)
    each = [bits] * model.stack.depth if isinstance(bits, int) else list(bits)
    turned = model if rotate is None else turn(model, kind=rotate, seed=seed or 0)
    walk = quantized_layers(
        turned, data, each, recipe_of(**options), samples=samples, batch=batch, split=split, spill=spill, seed=seed or 0, reference=True
    )
    errors = [made.error or 0.0 for made in walk]
    rows: list[list[Cell]] = [[i, b, e] for i, (b, e) in enumerate(zip(each, errors, strict=True))]
    return Findings({"stream_error": errors[-1]}, [Table("Error of the stream behind each layer", ["layer", "bits", "error"], rows)])
