"""Numbers and verdicts in words, the same everywhere on the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

VERDICTS = {
    "holds": ("Holds", "The whole 95 % interval of the difference, paired seed by seed, lies on the claimed side of zero."),
    "fails": ("Fails", "The whole 95 % interval of the difference, paired seed by seed, lies on the other side of zero than claimed."),
    "diverged": ("Fails", "Training of the claimed method diverged, so it cannot be better here."),
    "inconclusive": ("Inconclusive", "The 95 % interval of the difference, paired seed by seed, includes zero: these seeds cannot tell."),
    "seeds": ("Inconclusive", "With fewer than two paired seeds there is no interval, so nothing can be said about the claim."),
    "smoke": (
        "Claims nothing",
        "A smoke run takes seconds and only shows that the path works. The numbers below mean nothing beyond that.",
    ),
    "pending": ("No verdict yet", "The verdict is computed from all seeds when the run has finished."),
    "none": ("No claim", "This job measures and shows; it does not claim that one variant is better than another."),
}
SCALES = {
    "smoke": "Smoke scale: seconds of work that only show the path works. It claims nothing.",
    "tiny": "Tiny scale: the small experiment on a narrower model, one step of a trend over sizes.",
    "mini": "Mini scale: the small experiment on a narrower model, one step of a trend over sizes.",
    "small": "Small scale: an honest experiment in minutes on two cores, much smaller than the paper's.",
    "full": "Full scale: the paper's settings.",
}
STATES = {
    "unfinished": "This run is not finished: it is still going, or was killed. What it has so far is shown.",
    "stopped": "This run was stopped before its end; resuming goes on from here. What it has so far is shown.",
    "failed": "This run failed. What it had until then is shown.",
}


def verdict_key(receipt: dict[str, Any] | None, claim: dict[str, Any] | None, scale: str) -> str:
    """Which of `VERDICTS` a run has earned."""
    if claim is None:
        return "none"
    if scale == "smoke":
        return "smoke"
    verdict = (receipt or {}).get("verdict")
    if receipt is None or verdict not in VERDICTS:
        return "pending"
    if verdict == "fails" and ((receipt.get("variants") or {}).get(claim.get("method")) or {}).get("diverged"):
        return "diverged"
    if verdict == "inconclusive" and not (receipt.get("difference") or {}).get("ci95"):
        return "seeds"
    return verdict


def number(value: Any) -> str:
    """Four significant digits, thousands in groups, a real minus sign; text and whole numbers as they are.

    >>> number(1234567), number(0.0123456), number(-3.2), number(0.00001234)
    ('1,234,567', '0.01235', '−3.200', '1.234e−5')
    """
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        text = f"{value:,}"
    elif not math.isfinite(value):
        return "–"
    elif value == 0:
        text = "0"
    else:
        size = abs(float(f"{value:.3e}"))
        if 1e-3 <= size < 1e15:
            text = f"{value:,.{max(3 - math.floor(math.log10(size)), 0)}f}"
        else:
            mantissa, exponent = f"{value:.3e}".split("e")
            text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", "−")


def decimals(value: float | None, like: float | None) -> str:
    """`value` with as many decimals as four significant digits of `like` have, so that the two can be compared."""
    if value is None or not like or abs(like) < 1e-3 or abs(like) >= 1000:
        return number(value)
    return f"{value:,.{3 - math.floor(math.log10(abs(float(f'{like:.3e}'))))}f}".replace("-", "−")


def interval(bounds: Any, like: float | None = None) -> str:
    """`[low, high]`, or a dash where there is none."""
    if not bounds:
        return "–"
    return f"[{', '.join(decimals(float(bound), like) for bound in bounds)}]"


def duration(seconds: float | None) -> str:
    """`0.42 s`, `12.3 s`, `3 min 12 s`, `2 h 5 min`."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def size(count: float | None) -> str:
    """Bytes in decimal units: `4.94 MB`."""
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"


def went(before: float | None, after: float | None, say: Callable[[Any], str] = number, unit: str = "") -> str:
    """`8 → 6, −25.0 %`, or the one value where nothing changed or no other is known."""
    if before is None or after is None or before == after:
        return say(after if after is not None else before) + unit
    share = f", {(after - before) / before * 100:+.1f} %".replace("-", "−") if before else ""
    return f"{say(before)} → {say(after)}{unit}{share}"
