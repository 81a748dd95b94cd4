"""The page as a file: escaped, self-contained, whole, readable."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import example_run
import pytest
from example_run import findings

from layerwise.report import write_inspect_page, write_report
from layerwise.report.page import embedded, layer_label

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(2)> & \"quoted\" 'too' {{ 7 * 7 }} \u2028"
LOADS = {"src", "href", "srcset", "poster", "data", "action", "formaction", "background", "xlink:href"}


class Elements(HTMLParser):
    """Every element with its attributes, the text of data islands, and the text a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, text: str) -> None:
        current = self.inside[-1] if self.inside else ""
        (self.scripts if current == "script" else self.texts).append(text)


def parsed(path: Path) -> Elements:
    return Elements(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which every name and text is out to break the page."""
    folder = example_run.example_run(tmp_path_factory.mktemp("hostile") / "run")
    job = {
        **example_run.JOB,
        "title": HOSTILE,
        "family": HOSTILE,
        "paper": {"title": HOSTILE, "authors": HOSTILE, "year": 2024, "url": "javascript:alert(3)"},
    }
    (folder / "job.yaml").write_text(json.dumps(job).replace('"pre-ln"', json.dumps(HOSTILE)))
    for name in ("events.jsonl", "metrics.jsonl", "receipt.json"):
        text = (
            (folder / name)
            .read_text()
            .replace('"pre-ln"', json.dumps(HOSTILE))
            .replace('"Layers"', json.dumps(HOSTILE))
            .replace('"heal"', json.dumps(HOSTILE))
        )
        (folder / name).write_text(
            text.replace("args: list[str]", json.dumps(HOSTILE)[1:-1]).replace("The learning rate", json.dumps(HOSTILE)[1:-1])
        )
    return write_report(folder)


def test_hostile_names_stay_text(report: Path, hostile: Path) -> None:
    usual, found = parsed(report), parsed(hostile)
    assert {tag for tag, _ in found.elements} == {tag for tag, _ in usual.elements}
    assert sum(tag == "script" for tag, _ in found.elements) == sum(tag == "script" for tag, _ in usual.elements) == 4
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert not any("javascript:" in str(value) for _, attributes in found.elements for value in attributes.values())
    assert sum(HOSTILE in text for text in found.texts) > 5  # shown as it is


def test_embedded_data_cannot_leave_its_script(hostile: Path) -> None:
    text = hostile.read_text(encoding="utf-8")
    island = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert island is not None and not set("<>&\u2028") & set(island[1])
    assert HOSTILE in [v["name"] for v in json.loads(island[1])["variants"]]


def test_embedded_data_is_strict_json() -> None:
    assert json.loads(embedded({"a": [float("nan"), float("inf"), 1.5], "</script>": "<!--"})) == {
        "a": [None, None, 1.5],
        "</script>": "<!--",
    }


def test_lone_surrogates_do_not_stop_the_page(tmp_path: Path) -> None:
    assert write_inspect_page({"metrics": {"a\ud800": 1.0}, "notes": ["\ud800"]}, tmp_path / "i.html", "t\ud800").stat().st_size > 1_000_000


@pytest.mark.parametrize("page", ["report", "hostile"])
def test_nothing_is_loaded_from_anywhere(page: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(page)
    for tag, attributes in parsed(path).elements:
        for name in LOADS & set(attributes):
            value = attributes[name] or ""
            allowed = value.startswith(("#", "data:")) or (tag == "a" and value.startswith("https://arxiv.org/abs/"))
            assert allowed, (tag, name, value)
    style = re.search(r"<style>(.*?)</style>", path.read_text(encoding="utf-8"), re.S)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]


def test_policy_forbids_the_network(report: Path) -> None:
    (policy,) = [a["content"] for tag, a in parsed(report).elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'") and "http" not in policy and "connect-src" not in policy


def test_machine_paths_stay_out(report: Path, run_folder: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "/somewhere/private" not in text and str(run_folder) not in text


def test_verdict_and_numbers_are_in_the_text(report: Path) -> None:
    text = " ".join(" ".join(parsed(report).texts).split())
    for words in (
        "Holds",
        "−0.04755",
        "3 paired seeds",
        "ratio 0.9796",
        "the paper reports 0.97",
        "arXiv 2412.13795",
        "1,222,656",
        "reused 1 of 3",
    ):
        assert words in text


def test_smoke_claims_nothing(tmp_path: Path) -> None:
    page = write_report(example_run.example_run(tmp_path / "run", job={"scale": "smoke"}))
    texts = [t.strip() for t in parsed(page).texts]
    assert "Claims nothing" in texts and "Holds" not in texts


def test_one_variant_without_a_claim(tmp_path: Path) -> None:
    page = write_report(
        example_run.example_run(tmp_path / "run", job={"claim": None, "variants": {"default": {}}}, receipt=False, events=1)
    )
    assert "No claim" in [t.strip() for t in parsed(page).texts]


def test_ids_are_unique_and_controls_have_labels(report: Path) -> None:
    elements = parsed(report).elements
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    labelled = {a["for"] for tag, a in elements if tag == "label"}
    assert {a["id"] for tag, a in elements if tag in ("select", "input")} <= labelled
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_file_replaces_the_old_one_whole(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("old")
    assert write_report(run_folder, out) == out
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>") and list(tmp_path.iterdir()) == [out]


def test_inspect_page(tmp_path: Path) -> None:
    page = write_inspect_page(findings("pre-ln", 0, "look"), tmp_path / "inspect.html", "some <model>", "8 layers & more")
    found = parsed(page)
    assert {"some <model>", "8 layers & more", "1,619,200", "Looked at 128 rows of the training split."} <= {t.strip() for t in found.texts}
    ids = {a.get("id") for _, a in found.elements}
    assert {"layers", "matrices", "measured"} <= ids and not {"result", "verdict", "curves"} & ids


@pytest.mark.parametrize(
    ("index", "depth", "label"), [(-1, 8, "embedding"), (8, 8, "head"), (8, None, "8"), (0, 8, "0"), ("embedding", 8, "embedding")]
)
def test_layer_label(index: Any, depth: int | None, label: str) -> None:
    assert layer_label(index, depth) == label


def colours(theme: str) -> dict[str, str]:
    style = (Path(write_report.__code__.co_filename).parent / "style.css").read_text(encoding="utf-8")
    blocks = dict(re.findall(r'(:root(?:\[data-theme="dark"\])?) \{(.*?)\n\}', style, re.S))
    block = blocks[':root[data-theme="dark"]' if theme == "dark" else ":root"]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def contrast(a: str, b: str) -> float:
    """Contrast of two colours as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme: str) -> None:
    c = colours(theme)
    for ground in ("paper", "sheet", "tint"):
        assert min(contrast(c[text], c[ground]) for text in ("ink", "soft", "link")) >= 4.5
    for tone in ("holds", "fails", "unsure"):
        assert contrast(c[tone], c[f"{tone}-tint"]) >= 4.5 and contrast(c["ink"], c[f"{tone}-tint"]) >= 4.5
    assert min(contrast(c[f"c{i}"], c["paper"]) for i in range(8)) >= 3  # lines and dots
