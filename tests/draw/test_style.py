from sdd.draw.style import DARK_PAPER, OWN_STYLE, PAPER, PLACEMENT_STYLES, line_styles
from sdd.placement import placements


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours `#rrggbb` by WCAG 2, from 1 to 21."""
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    channels = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_placement_has_a_look_of_its_own() -> None:
    assert placements.keys() <= PLACEMENT_STYLES.keys()
    styles = [*PLACEMENT_STYLES.values(), OWN_STYLE]
    assert len({style.color for style in styles}) == len(styles)
    assert len({style.marker for style in styles}) == len(styles)


def test_colours_stand_out_from_the_light_and_the_dark_page() -> None:
    for style in (*PLACEMENT_STYLES.values(), OWN_STYLE):
        assert contrast(style.color, PAPER) >= 3
        assert contrast(style.color, DARK_PAPER) >= 3


def test_contrast_of_black_on_white_is_21() -> None:
    assert round(contrast("#000000", "#ffffff"), 6) == 21


def test_later_runs_of_a_placement_keep_its_colour_and_are_dashed() -> None:
    first, other, second = line_styles(["sdd", "olmo2", "sdd"])
    assert first == PLACEMENT_STYLES["sdd"]
    assert other == PLACEMENT_STYLES["olmo2"]
    assert second.color == first.color
    assert second.marker == first.marker
    assert second.dash != first.dash


def test_unknown_placement_is_grey() -> None:
    assert line_styles(["my own"]) == [OWN_STYLE]
