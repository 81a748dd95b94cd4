"""A run folder and its page, and a browser that notices every error and every request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from example_run import example_run

from layerwise.report import write_report

CHROMIUM = Path("/usr/bin/chromium")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example_run(tmp_path_factory.mktemp("report") / "mix-ln")


@pytest.fixture(scope="session")
def report(run_folder: Path) -> Path:
    return write_report(run_folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=QUIET)
        yield browser
        browser.close()


def until(page: Any, condition: str) -> None:
    """Wait for a condition; playwright's own waiting evaluates strings, which the page forbids."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {condition}")


@pytest.fixture
def wait() -> Any:
    return until


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Open a file as a reader would: `visit(path, width=1280, scheme="light")`. At the end nothing may have gone wrong."""
    wrong: list[str] = []
    with contextlib.ExitStack() as contexts:

        def open_page(path: Path, width: int = 1280, scheme: str = "light") -> Any:
            context = contexts.enter_context(
                contextlib.closing(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
            )
            page = context.new_page()
            page.on("console", lambda message: wrong.append(f"console {message.type}: {message.text}"))
            page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
            page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
            page.on(
                "request",
                lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else wrong.append(f"request: {request.url}"),
            )
            page.goto(path.resolve().as_uri())
            until(page, "[...document.querySelectorAll('.plot')].every(p => p.hidden || p.querySelector('.main-svg'))")
            return page

        yield open_page
    assert not wrong
