from pathlib import Path

import numpy as np
import pytest

from sdd.draw.curves import draw, inline_svg, save_figure, short_count, swatch_svg
from sdd.draw.panel import Line, Panel
from sdd.draw.style import OWN_STYLE


@pytest.fixture
def panel() -> Panel:
    x = np.arange(20.0)
    line = Line("$a_1$ _ 走る", x, 1 + x, OWN_STYLE, raw=(x, x), broken=True, alarm=4.0, events=(7.0,))
    return Panel("Loss", "nats", [line], reference=(3.0, "reference"))


def test_figure_files_are_reproducible(tmp_path: Path, panel: Panel) -> None:
    first, second = (save_figure(draw([panel, panel], title="1 seed"), tmp_path / place / "v1.0") for place in "xy")
    assert [file.name for file in first] == ["v1.0.png", "v1.0.svg"]
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert first[1].read_bytes() == second[1].read_bytes()
    assert "$a_1$" in first[1].read_text()


def test_inline_svg_takes_colour_font_and_size_from_the_page(panel: Panel) -> None:
    svg = inline_svg(draw([panel]), "name", 'a "description"')
    assert svg.startswith('<svg role="img" aria-label="a &quot;description&quot;"')
    assert "currentColor" in svg
    assert "DejaVu" not in svg
    assert " width=" not in svg[: svg.index(">")]
    assert "<metadata>" not in svg


def test_ids_of_inline_svgs_begin_with_their_names(panel: Panel) -> None:
    svg = inline_svg(draw([panel]), "name", "")
    for mark in (' id="', "url(#", 'href="#'):
        assert svg.count(mark) == svg.count(f"{mark}name-") > 0


def test_swatch_shows_the_colour() -> None:
    assert OWN_STYLE.color in swatch_svg(OWN_STYLE)


def test_panel_without_values_is_drawn(tmp_path: Path) -> None:
    save_figure(draw([Panel("Empty", "unit")], legend=False), tmp_path / "empty")


@pytest.mark.parametrize(("value", "text"), [(500, "500"), (20_000, "20k"), (1_500_000, "1.5M"), (2e11, "200B")])
def test_short_count(value: float, text: str) -> None:
    assert short_count(value) == text
