"""The pages as a browser shows them."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import BROWSER, Chromium

from helpers_runs import config_of, write_run
from sdd.report import serve
from sdd.report.html import write_page
from sdd.report.page import render
from sdd.report.runs import load_runs
from sdd.report.serve import LivePage

pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Make a page about a failed run with an alarm and a sound run of a mixture of experts; returns its address."""
    folder = tmp_path_factory.mktemp("pages")
    broken = write_run(folder / "broken", config_of("postnorm"), breaks_at=51, probed=True, fades_at=30)
    name = "a-run-with-a-long-name-that-no-phone-has-room-for"
    sound = write_run(folder / name, config_of(), probed=True, experts=8, dead_from=20)
    write_page(folder / "report.html", render(load_runs([broken, sound])))
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 390])
def test_page_is_whole_on_screens_of_any_size(browser: Chromium, page: str, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    pictures = browser.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].map((svg) => svg.getBoundingClientRect().width)"
    )
    assert len(pictures) > 20
    assert all(min(250, width / 2) < found <= width for found in pictures)
    swatches = browser.evaluate(
        "[...document.querySelectorAll('svg.swatch')].map((svg) => svg.getBoundingClientRect().width)"
    )
    assert set(swatches) == {34}
    light = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light != dark
    assert browser.complaints() == []
    assert browser.requests() == [page]


def test_first_screen_of_a_phone_shows_what_broke_first_and_when(browser: Chromium, page: str) -> None:
    browser.open(page, 390, 844)
    seen = browser.evaluate(
        "[...document.querySelectorAll('.verdict h2')].filter((h) => h.getBoundingClientRect().bottom < innerHeight)"
        ".map((h) => h.innerText)"
    )
    assert "since step 30, first in block 1" in seen[0]


def test_live_page_updates_without_losing_the_place(
    browser: Chromium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(serve, "TIMES_THE_LAST", 0.0)
    run = write_run(tmp_path / "run", config_of(), until=40)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    live = LivePage(0)
    with live.serving(run):
        browser.open(live.url, 390)
        _wait(browser, "document.body.innerText.includes('step 40 of 60')")
        browser.evaluate("document.querySelector('details').open = true; scrollTo(0, 1500)")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(lines[-2].replace('"step": 40', '"step": 41'))
        _wait(browser, "document.body.innerText.includes('step 41 of 60')")
        assert browser.evaluate("scrollY") == 1500
        assert browser.evaluate("document.querySelector('details').open")
        assert browser.complaints() == []
        assert set(browser.requests()) == {f"{live.url}/"}
    _wait(browser, "document.body.innerText.startsWith('No answer: the run has ended')")


def _wait(browser: Chromium, condition: str, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not browser.evaluate(condition):
        assert time.monotonic() < until, browser.evaluate("document.body.innerText")[:2000]
        time.sleep(0.3)
