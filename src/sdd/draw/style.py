"""The style of each placement, the same in every figure: colour and marker tell placements apart, dashes their runs.

All colours have a contrast of at least 3:1 to the white and to the dark page. The first four are from Okabe and Ito's
colour-blind safe palette; the others rely on their markers too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

#: A marker of matplotlib; (n, 1, degrees) is a star of n points.
Marker = Literal["o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8", ""] | tuple[int, Literal[1], int]

INK = "#1b1c1e"  # of text and axes; in a page it becomes the page's text colour
PAPER = "#ffffff"
DARK_PAPER = "#16181b"


@dataclass(frozen=True)
class Style:
    """Colour, marker ("" for none) and dash of one line; the dash is in points, empty for a solid line."""

    color: str
    marker: Marker
    dash: tuple[float, ...] = ()


PLACEMENT_STYLES: Mapping[str, Style] = MappingProxyType(
    {
        "sdd": Style("#0072b2", "o"),
        "prenorm-qk": Style("#d55e00", "s"),
        "postnorm": Style("#c05f98", "^"),
        "deepnorm": Style("#009068", "D"),
        "prenorm": Style("#a0742c", "v"),
        "olmo2": Style("#857d00", "P"),
        "peri": Style("#7a6fd0", "X"),
        "hybrid": Style("#8a8a8a", "p"),
        "qkv-norm": Style("#b5533c", "h"),
        "sdd-v1": Style("#64788f", (4, 1, 45)),
        "sdd-depth": Style("#1a7fd4", (5, 1, 0)),
        "sdd-paper": Style("#2d8fc4", "<"),
        "sdd-released": Style("#4a78d8", ">"),
        "sdd-prenorm": Style("#1f8c9c", "d"),
        "keel": Style("#d0457a", (4, 1, 0)),
        "ngpt": Style("#5c8f2e", (3, 1, 0)),
        "peri-depth": Style("#9a6bc8", "8"),
        "lns": Style("#b8860b", (6, 1, 0)),
    }
)
OWN_STYLE = Style("#808080", "*")
REFERENCE_STYLE = Style(INK, "", (4, 3))

_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (9, 3), (3, 1.5, 3, 1.5, 1, 1.5))


def line_styles(placements: Sequence[str]) -> list[Style]:
    """Return a style for each run, given the runs' placements in order; later runs of a placement are dashed."""
    styles: list[Style] = []
    for index, placement in enumerate(placements):
        dash = _DASHES[placements[:index].count(placement) % len(_DASHES)]
        styles.append(replace(PLACEMENT_STYLES.get(placement, OWN_STYLE), dash=dash))
    return styles
