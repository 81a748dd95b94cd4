"""The page about a plan: every method under its own name, and the pictures drawn."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from layerwise.report.plan_page import write_plan_page

BITS, CUT = (
    {"drop": False, "heads": 1.0, "ffn": 1.0, "rank": 1.0, "bits": 2, "tokens": None},
    {"drop": False, "heads": 0.5, "ffn": 0.25, "rank": 1.0, "bits": 3, "tokens": None},
)


def candidate(share: float, held_out: float, layer: dict[str, Any], method: str) -> dict[str, Any]:
    made = {"bytes": int(1e6 * share), "share": share, "families": [], "method": method, "predicted": held_out - 2, "loss": held_out}
    return {**made, "added": held_out - 2, "held_out": held_out, "ms": None, "measured_ms": None, "layers": [layer] * 3}


def plan() -> dict[str, Any]:
    bits, cut = candidate(0.19, 2.02, BITS, "bits per layer"), candidate(0.198, 1.9999, CUT, "combination")
    methods = {"width": None, "bits per layer": bits, "bits, uniform": bits, "combination": cut}
    target = {
        "target": 0.2,
        "budget": 200_000,
        "target_ms": None,
        "plan": cut,
        "methods": methods,
        "outcome": "beats",
        "sentence": "It <beats> it.",
    }
    moves = [{**BITS, "added": [-0.1, 0.0, 0.2], "divergence": [0.1, 0.0, 0.2]}]
    return {
        "model": "a <model>", "measure": {"name": "next tokens", "unit": "nats a token"}, "bytes": 1_000_000, "held_out": 2.0, "ms": None, "targets": [target], "front": [bits, cut], "tried": [bits, cut],
        "prediction": {"spearman": None, "points": 2}, "sensitivity": moves, "environment": {"torch": "2"}, "data": [], "notes": ["a note"],
    }  # fmt: skip


def test_methods_stand_under_their_own_names_best_first(tmp_path: Path) -> None:
    text = write_plan_page(plan(), tmp_path / "plan.html").read_text()
    rows = re.findall(r'<th scope="row"><i class="swatch[^>]*></i>([^<]*?) *(?:<span class="role">the plan</span>)?</th>', text)
    assert rows == ["combination", "bits per layer", "bits, uniform", "width"]
    assert text.count("cannot make the model so small") == 1 and "It &lt;beats&gt; it." in text and "<model>" not in text


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_it_is_drawn_and_nothing_overflows(visit: Any, tmp_path: Path, width: int) -> None:
    page = visit(write_plan_page(plan(), tmp_path / "plan.html"), width)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    drawn = page.evaluate("[...document.querySelectorAll('.plot')].filter(p => p.querySelector('.main-svg')).map(p => p.id)")
    assert drawn == ["front-plot", "relation-plot-0", "layer-plot"]
    # A loss that falls cannot be drawn on a logarithmic scale: it stands at the least one.
    heights = page.evaluate("document.getElementById('front-plot').data.map(t => t.y)")
    assert heights[0] == pytest.approx([0.02, 1e-4]) and len(heights) == 4
