"""The page in a browser: every control does what it says, nothing is fetched, nothing overflows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from example_run import DEPTH, JOB, STEPS, example_run, findings, layer_table, value

from layerwise.report import write_inspect_page, write_report

pytestmark = pytest.mark.browser


BEYOND = """Math.max(...[...document.querySelectorAll('.plot')].map(p =>
    p.querySelector('.main-svg').getBoundingClientRect().right - p.getBoundingClientRect().right))"""
"""How far a picture reaches beyond its place."""

CUT = """[...document.querySelectorAll('.plot')].flatMap(p => {
    const box = p.getBoundingClientRect();
    return [...p.querySelectorAll('text')].filter(t => t.textContent && t.getBoundingClientRect().width).filter(t => {
        const r = t.getBoundingClientRect();
        return r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1;
    }).map(t => p.id + ': ' + t.textContent);
})"""
"""Texts of pictures that are cut off at an edge."""


def figure(page: Any, name: str, what: str) -> Any:
    return page.evaluate(f"(() => {{ const p = document.getElementById('{name}'); return {what}; }})()")


def bold(page: Any) -> dict[str, dict[str, Any]]:
    """The mean lines of the training plot by variant."""
    lines = figure(page, "curve-plot", "p.data.map(t => ({name: t.name, x: t.x, y: t.y, width: t.line.width}))")
    return {line["name"]: line for line in lines if line["width"] > 2}


def smooth(page: Any, strength: str) -> None:
    page.locator("#curve-smooth").fill(strength)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_renders_without_overflow(visit: Any, report: Path, width: int, scheme: str) -> None:
    page = visit(report, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    drawn = page.evaluate("[...document.querySelectorAll('.plot')].filter(p => p.querySelector('.main-svg')).map(p => p.id)")
    assert drawn == ["result-plot", "difference-plot", "relation-plot-0", "curve-plot", "layer-plot", "matrix-plot", "series-plot"]
    assert page.evaluate(BEYOND) <= 0.5
    assert page.evaluate(CUT) == []


def test_page_follows_the_width(visit: Any, wait: Any, report: Path) -> None:
    page = visit(report)
    page.set_viewport_size({"width": 400, "height": 900})
    wait(page, "document.querySelector('#curve-plot .main-svg').getBoundingClientRect().width < 400")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_log_scale(visit: Any, report: Path) -> None:
    page = visit(report)
    assert figure(page, "curve-plot", "p.layout.yaxis.type") == "linear"
    page.locator("#curve-log").check()
    assert figure(page, "curve-plot", "p.layout.yaxis.type") == "log"
    page.locator("#curve-log").uncheck()
    assert figure(page, "curve-plot", "p.layout.yaxis.type") == "linear"


def test_mean_is_over_seeds_and_smoothing_is_the_corrected_average(visit: Any, report: Path) -> None:
    from example_run import loss_of

    page = visit(report)
    page.select_option("#curve-stage", "stage pretrain")
    lines = figure(page, "curve-plot", "p.data.length")
    assert lines == 3 * (3 + 1)
    raw = [sum(loss_of("pre-ln", s, "pretrain", i) for s in range(3)) / 3 for i in STEPS]
    assert bold(page)["pre-ln"]["y"] == pytest.approx(raw, rel=1e-5)
    smooth(page, "0.8")
    expected, total, weight = [], 0.0, 0.0
    for y in raw:
        total, weight = 0.8 * total + 0.2 * y, 0.8 * weight + 0.2
        expected.append(total / weight)
    assert bold(page)["pre-ln"]["y"] == pytest.approx(expected, rel=1e-5)
    assert page.locator("#curve-smooth-value").inner_text() == "0.80"


def test_axis_and_stages(visit: Any, report: Path) -> None:
    page = visit(report)
    both = bold(page)["mix-ln"]
    assert both["x"][-1] == 300 and None in both["y"]  # 200 steps, a gap, 100 steps
    page.select_option("#curve-stage", "stage heal")
    assert bold(page)["mix-ln"]["x"] == list(range(5, 105, 5))
    page.select_option("#curve-axis", "tokens")
    assert bold(page)["mix-ln"]["x"] == [i * 2048 for i in range(5, 105, 5)]
    page.select_option("#curve-axis", "seconds")
    assert bold(page)["mix-ln"]["x"] == pytest.approx([i * 0.19 + 0.01 for i in range(5, 105, 5)])
    page.select_option("#curve-metric", "val_loss")
    assert len(bold(page)["mix-ln"]["x"]) == 5


def test_legend_switches_variants(visit: Any, report: Path) -> None:
    page = visit(report)
    button = page.get_by_role("button", name="pre-ln", exact=True)
    button.focus()
    page.keyboard.press("Space")
    assert button.get_attribute("aria-pressed") == "false" and set(bold(page)) == {"mix-ln", "post-ln"}
    button.click()
    assert set(bold(page)) == {"mix-ln", "pre-ln", "post-ln"}


def test_result_metric_and_difference(visit: Any, report: Path) -> None:
    page = visit(report)
    marks = "p.data.filter(t => t.marker && t.marker.symbol).map(t => t.x[0])"
    assert figure(page, "result-plot", marks) == pytest.approx(
        [sum(value(v, s) for s in range(3)) / 3 for v in ("mix-ln", "pre-ln", "post-ln")]
    )
    assert figure(page, "result-plot", "p.data.filter(t => t.mode === 'lines').length") == 3
    page.select_option("#result-metric", "quality.accuracy")
    assert figure(page, "result-plot", marks) == pytest.approx([0.471] * 3)
    assert figure(page, "result-plot", "p.data.filter(t => t.mode === 'lines').length") == 0  # intervals are the claim's
    shade = figure(page, "difference-plot", "p.layout.shapes[0]")
    assert shade["x1"] == 0 and shade["x0"] < 0  # lower is better
    low, high = figure(page, "difference-plot", "p.layout.xaxis.range")
    assert low < 0 < high


def test_relation_marks_what_does_not_count(visit: Any, report: Path) -> None:
    page = visit(report)
    symbols = figure(page, "relation-plot-0", "p.data.map(t => t.marker.symbol)")
    assert sorted(symbols) == ["circle"] * 6 + ["circle-open"] * 3
    assert "Spearman's rank correlation is 0.2571 over 6 points" in page.locator("#relations figcaption").inner_text()


def test_layer_tables(visit: Any, report: Path) -> None:
    page = visit(report)
    heat = "p.data.filter(t => t.type === 'heatmap').map(t => t.z[0])"
    norms = figure(page, "layer-plot", heat)[-1]
    rows = [layer_table("mix-ln", s)["rows"] for s in range(3)]
    assert norms == pytest.approx([sum(r[i][5] for r in rows) / 3 for i in range(DEPTH + 2)])
    page.select_option("#layer-variant", "post-ln")
    page.select_option("#layer-seed", "seed 1")
    assert figure(page, "layer-plot", heat)[-1] == [row[5] for row in layer_table("post-ln", 1)["rows"]]
    ticks = figure(page, "layer-plot", "[p.layout.xaxis.tickvals, p.layout.xaxis.ticktext]")
    assert ticks[0] == ticks[1] == ["embedding", *map(str, range(DEPTH)), "head"]
    # The label of a layer stands under its cell: the place of layer 3 is the fifth.
    places = page.evaluate("(() => { const p = document.getElementById('layer-plot'); return p._fullLayout.xaxis.d2c('3'); })()")
    assert places == 4
    page.locator("#layers summary").click()
    assert page.locator("#layer-numbers tbody tr").count() == DEPTH + 2
    page.select_option("#layer-table", label="Loss without each layer")
    (change,) = figure(page, "layer-plot", "p.data.filter(t => t.type === 'heatmap').map(t => [t.zmin, t.zmax])")
    assert change[0] == pytest.approx(
        min(0.9 * 2.718281828 ** (-i / 1.5) + (-0.012 if i in (5, 6) else 0.05) for i in range(DEPTH)), abs=1e-4
    )
    page.select_option("#layer-view", "profiles")
    assert figure(page, "layer-plot", "p.data.length") == 3 and not page.locator("#layer-variant").is_visible()
    assert page.locator("#layer-legend span").count() == 3


def test_matrices(visit: Any, report: Path) -> None:
    page = visit(report)
    corner = "p.data[0].z[0][0]"
    mean = figure(page, "matrix-plot", corner)
    page.select_option("#matrix-seed", "seed 2")
    assert figure(page, "matrix-plot", corner) == findings("mix-ln", 2, "look")["matrices"][0]["values"][0][0] != mean
    assert figure(page, "matrix-plot", "p.data[0].z[7][7]") is None
    assert page.locator("#matrix-title-name").inner_text() == "Angular distance of a block"


def test_series(visit: Any, report: Path) -> None:
    page = visit(report)
    assert figure(page, "series-plot", "p.data[0].y") == ["embedding", *map(str, range(DEPTH)), "head"]
    page.select_option("#series-key", "rotation")
    assert figure(page, "series-plot", "[p.data[0].y.length, p.data[0].x.length]") == [DEPTH, 20]
    page.select_option("#series-stage", "heal")
    assert figure(page, "series-plot", "p.data[0].y") == [str(i) for i in range(6)]
    page.select_option("#series-view", "lines")
    assert figure(page, "series-plot", "p.data.filter(t => t.mode === 'lines').length") == 6
    page.locator("#series-log").check()
    assert figure(page, "series-plot", "p.layout.yaxis.type") == "log"
    page.select_option("#series-view", "heat")
    page.select_option("#series-seed", "seed 0")
    page.select_option("#series-variant", "pre-ln")
    assert figure(page, "series-plot", "p.data[0].zmax") < 0  # logarithms of numbers below one


def test_other_tables(visit: Any, report: Path) -> None:
    page = visit(report)
    assert page.locator("#other-numbers tbody tr").count() == 3
    assert page.locator("#other-table-name").inner_text() == "Block that turns the stream least"
    page.select_option("#other-seed", "seed 2")
    assert page.locator("#other-numbers td").first.inner_text() == "6"


def test_theme_button_restyles_the_plots_and_is_remembered(visit: Any, report: Path) -> None:
    page = visit(report)
    ink = figure(page, "curve-plot", "p.layout.font.color")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert (
        figure(page, "curve-plot", "p.layout.font.color") != ink
        and page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
    )
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.emulate_media(color_scheme="dark")
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_theme_follows_the_system(visit: Any, wait: Any, report: Path) -> None:
    page = visit(report)
    page.emulate_media(color_scheme="dark")
    wait(page, "document.documentElement.dataset.theme === 'dark'")


def test_plots_can_be_saved(visit: Any, report: Path, tmp_path: Path) -> None:
    page = visit(report)
    with page.expect_download() as download:
        page.locator("#curves .save").click()
    download.value.save_as(tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_text(encoding="utf-8").startswith("<svg")


def test_contents_lead_to_sections(visit: Any, report: Path) -> None:
    page = visit(report)
    for link in page.locator("#contents a").all():
        assert page.locator(str(link.get_attribute("href"))).count() == 1
    assert page.locator("#contents a").count() >= 10


@pytest.mark.parametrize("width", [1280, 400])
def test_hostile_names(visit: Any, tmp_path: Path, width: int) -> None:
    folder = example_run(tmp_path / "run")
    name = "</script><script>alert(1)</script><img src=x onerror=alert(2)><b>%{x}</b> and a long tail that goes on and on"
    for file in ("events.jsonl", "metrics.jsonl", "receipt.json"):
        (folder / file).write_text((folder / file).read_text().replace('"pre-ln"', json.dumps(name)))
    job = {**JOB, "variants": {"mix-ln": {}, name: {}, "post-ln": {}}, "claim": {**JOB["claim"], "baseline": name}}
    (folder / "job.yaml").write_text(json.dumps(job))
    page = visit(write_report(folder), width)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.images.length") == 0
    page.select_option("#layer-view", "profiles")
    assert name in page.locator("#layer-legend").inner_text()
    if width == 1280:
        assert "</script>" in page.locator("#result-plot .yaxislayer-above").text_content()


@pytest.mark.parametrize("events", [0, 1, 3, 5, 20])
def test_unfinished_runs(visit: Any, tmp_path: Path, events: int) -> None:
    page = visit(write_report(example_run(tmp_path / "run", events=events, receipt=False)))
    assert "not finished" in page.locator(".notice").inner_text()
    assert page.locator("#verdict").inner_text() == "No verdict yet"


@pytest.mark.parametrize("width", [1280, 400])
def test_inspect_page(visit: Any, tmp_path: Path, width: int) -> None:
    page = visit(write_inspect_page(findings("pre-ln", 0, "look"), tmp_path / "inspect.html", "a model", "8 layers"), width)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert figure(page, "layer-plot", "p.data.filter(t => t.type === 'heatmap').length") == 5
    assert not page.locator("#layer-seed").is_visible() and not page.locator("#matrix-variant").is_visible()


def test_inspect_page_with_odd_tables(visit: Any, tmp_path: Path) -> None:
    """A table without rows, without numbers, of one layer; a matrix of equal values and one without any."""
    odd = {
        "tables": [
            {"title": "empty", "columns": ["layer", "x"], "rows": []},
            {"title": "words", "columns": ["layer", "kind"], "rows": [[0, "pre"], [1, "post"]]},
            {"title": "one", "columns": ["layer", "x"], "rows": [[0, 1.0]]},
            {"title": "flat", "columns": ["layer", "x"], "rows": [[0, 0.0], [1, 0.0], [2, None]]},
        ],
        "matrices": [
            {"title": "flat", "x_label": "x", "y_label": "y", "x": ["a", "b"], "y": ["c"], "values": [[1.0, 1.0]]},
            {"title": "none", "x_label": "x", "y_label": "y", "x": ["a"], "y": ["c"], "values": [[None]]},
        ],
    }
    page = visit(write_inspect_page(odd, tmp_path / "odd.html", "odd"))
    for title in ("words", "one", "flat", "empty"):
        page.select_option("#layer-table", label=title)
        for view in ("profiles", "strips"):
            page.select_option("#layer-view", view)
    page.select_option("#layer-table", label="words")
    page.locator("#layers summary").click()
    assert page.locator("#layer-numbers td").all_inner_texts() == ["pre", "post"] and not page.locator("#layer-plot").is_visible()
    page.select_option("#matrix-title", label="none")
