import math
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers_runs import edit_json, probe_row
from sdd.errors import UserError
from sdd.placement import placements
from sdd.probing import append_row
from sdd.report.html import write_page
from sdd.report.page import render, write_report
from sdd.report.runs import load_run, load_runs
from sdd.report.verdict import verdict

MakeRun = Callable[..., Path]


class Page(HTMLParser):
    """The elements and the text of a page; fails if an element is not closed."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(tmp_path: Path, *runs: Path) -> Page:
    out = tmp_path / "pages" / "report.html"
    write_page(out, render(load_runs(runs)))
    return Page(out)


def test_page_fetches_nothing(tmp_path: Path, make_run: MakeRun) -> None:
    page = report(tmp_path, make_run("a"), make_run("b", placement="postnorm", probed=True))
    assert any((image.get("xlink:href") or "").startswith("data:image/png;base64,") for image in page.all("image"))
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not attributes.get("src")
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "@import" not in page.source
    assert not re.search(r"url\((?!#)", page.source)


def test_page_has_what_phones_and_screen_readers_need(tmp_path: Path, make_run: MakeRun) -> None:
    page = report(tmp_path, make_run("a"), make_run("b"))
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert page.all("html")[0]["lang"] == "en"
    pictures = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(pictures) == 5
    for svg in pictures:
        assert svg["role"] == "img"
        assert re.search("against (tokens|seconds of training)", svg["aria-label"] or "")
        assert "width" not in svg
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_figures_take_the_colours_of_the_page(tmp_path: Path, make_run: MakeRun) -> None:
    page = report(tmp_path, make_run("a"))
    svg = page.source[page.source.index("<svg") : page.source.rindex("</svg>")]
    assert "currentColor" in svg
    assert "#ffffff" not in svg
    assert "prefers-color-scheme: dark" in page.source


def test_overview_shows_numbers_and_ends(tmp_path: Path, make_run: MakeRun) -> None:
    page = report(
        tmp_path,
        make_run("good", lr=0.02),
        make_run("broken", placement="postnorm", breaks_at=31),
        make_run("killed", placement="olmo2", until=17),
    )
    for word in ("good", "0.02", "done", "did not converge", "step 31: loss nan", "unfinished", "step 17 of 60"):
        assert word in page.text


def test_differing_settings_stand_apart_from_common_ones(tmp_path: Path, make_run: MakeRun) -> None:
    page = report(tmp_path, make_run("a"), make_run("b", placement="olmo2", lr=0.02))
    differing = page.source[page.source.index('aria-label="Settings that differ') : page.source.index("<details>")]
    assert re.findall(r"<code>(.*?)</code>", differing) == ["model.placement", "optim.lr"]
    common = page.source[page.source.index("<details>") : page.source.index("</details>")]
    assert "optim.beta2" in common
    assert "optim.lr<" not in common


def test_placements_of_one_name_and_two_definitions_are_told_apart(tmp_path: Path, make_run: MakeRun) -> None:
    first, second = make_run("a"), make_run("b")
    text = (second / "config.json").read_text()
    (second / "config.json").write_text(text.replace("1e-06", "1e-05"))
    assert len(set(re.findall(r"sdd \([0-9a-f]{6}\)", report(tmp_path, first, second).text))) == 2


def test_a_page_shows_runs_of_every_placement(tmp_path: Path, make_run: MakeRun) -> None:
    ends = {name: 4 + 0.01 * index for index, name in enumerate(placements)}
    runs = [make_run(f"run-{name}", placement=name, end=end) for name, end in ends.items()]
    page = report(tmp_path, *runs)
    for run in load_runs(runs):
        assert f"run-{run.placement}" in page.text
        assert f"{run.eval_loss:.3f}" in page.text


def test_nothing_from_a_file_is_taken_for_html(tmp_path: Path, make_run: MakeRun) -> None:
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}$x_1$"
    path = make_run("<b>$x_1$ &lt;i onload='x'>", breaks_at=31)
    edit_json(path / "result.json", reason=f"not finite {bad}")
    edit_json(path / "environment.json", platform=bad, command=[bad])
    edit_json(path / "config.json", **{bad: bad})
    edit_json(path / "config.json", data={"path": bad})
    with (path / "samples.jsonl").open("a") as file:
        file.write('{"step": 60, "prompt": "<script>", "text": "</blockquote><script>"}\n')
    page = report(tmp_path, path)
    assert not {"script", "img", "b", "i"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count("<script>alert(1)</script>") >= 4
    assert "49" not in page.text.partition("{{ 7*7 }}")[0][-20:]


def test_runs_in_any_state_are_shown(tmp_path: Path, make_run: MakeRun) -> None:
    nothing = make_run("nothing", until=1)
    for file in ("metrics.jsonl", "environment.json"):
        (nothing / file).unlink()
    started = make_run("started", until=1)
    odd = make_run("odd")
    (odd / "samples.jsonl").write_text('{"step": null}\n{"text": 5}\n')
    (odd / "config.json").write_text('{"steps": "many", "optim": [], "model": {"placement": null}}')
    assert not any("against" in (svg.get("aria-label") or "") for svg in report(tmp_path, nothing).all("svg"))
    assert "own placement" in report(tmp_path, nothing, started, odd).text


def test_directory_that_is_no_run_is_refused_in_one_line(tmp_path: Path, make_run: MakeRun) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="other is no run") as caught:
        write_report([make_run("a"), tmp_path / "other"], tmp_path / "r.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "r.html").exists()


def test_page_that_cannot_be_written_is_named(tmp_path: Path, make_run: MakeRun) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report([make_run("a")], tmp_path / "file" / "r.html")


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_missing_extra_is_named(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"{missing}: pip install 'sdd-torch\[report\]'"):
        write_report([make_run("a")], tmp_path / "r.html")


def test_page_begins_with_the_verdict(tmp_path: Path, make_run: MakeRun) -> None:
    path = make_run("a", placement="postnorm", probed=True, fades_at=30)
    page = report(tmp_path, path)
    assert page.text.index(verdict(load_run(path)).headline) < page.text.index("Bits per byte")


def test_page_lists_the_actions_of_the_guard(tmp_path: Path, make_run: MakeRun) -> None:
    path = make_run("a")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "event": "skip", "kind": "loss spike", "what": "loss 9.3 <b>", "batch": 40}\n')
    assert re.search(r"step 41: loss spike: loss 9\.3 <b>; skip \(batch 40\)", report(tmp_path, path).text)


def test_runs_without_and_with_little_probe_are_shown(tmp_path: Path, make_run: MakeRun) -> None:
    empty, odd, one = make_run("empty"), make_run("odd"), make_run("one", until=10, probed=True)
    (empty / "probe.jsonl").touch()
    (odd / "probe.jsonl").write_text('{"step": 1}\n{"step": "x", "sites": {}, "layers": {}}\n[]\n{"sites"')
    assert [run.probe is None for run in load_runs([empty, odd, one])] == [True, True, False]
    assert "Residual stream" in report(tmp_path, empty, odd, one).text


def test_page_of_a_deep_and_long_run_stays_small(tmp_path: Path, make_run: MakeRun) -> None:
    path = make_run("a")
    for step in range(1, 201):
        append_row(path / "probe.jsonl", probe_row(step, math.sin(step), blocks=32))
    page = render(load_runs([path]))
    assert len(page) < 1_000_000


def test_page_comes_with_its_figures_as_files(tmp_path: Path, make_run: MakeRun) -> None:
    runs = [make_run("a", probed=True), make_run("b", probed=True, fades_at=30)]
    lines = write_report(runs, tmp_path / "pages" / "v1.0.html")
    assert lines == [f"{run.name}: {verdict(run).headline}" for run in load_runs(runs)]
    assert sorted(path.name for path in (tmp_path / "pages").iterdir()) == ["v1.0-figures", "v1.0.html"]
    names = {path.name for path in (tmp_path / "pages" / "v1.0-figures").iterdir()}
    for name in ("heldout", "loss", "loss-time", "grad-norm", "lr", "map-stream", "map-stream-grad", "map-updates"):
        assert {f"{name}.png", f"{name}.svg"} <= names
