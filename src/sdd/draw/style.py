"""How each placement is drawn, the same in every figure: colour and marker say the placement, the dash which run of it.

All colours have a contrast of at least 3:1 to white and to the dark page. The first four are of Okabe and Ito's
colour-blind safe palette; further ones lean on their markers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Marker = Literal["o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", ""]

INK = "#1b1c1e"  # text and axes; a page replaces it by its own text colour
PAPER = "#ffffff"
DARK_PAPER = "#16181b"


@dataclass(frozen=True)
class Style:
    """Colour, marker ("" for none) and dash of one line; dash is in points, empty for a solid line."""

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
        "sdd-paper": Style("#2d8fc4", "<"),
        "sdd-released": Style("#4a78d8", ">"),
        "sdd-prenorm": Style("#1f8c9c", "d"),
    }
)
OWN_STYLE = Style("#808080", "*")
REFERENCE_STYLE = Style(INK, "", (4, 3))

_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (9, 3), (3, 1.5, 3, 1.5, 1, 1.5))


def line_styles(placements: Sequence[str]) -> list[Style]:
    """A style for each run, given the runs' placements in order; later runs of one placement are dashed."""
    seen: dict[str, int] = {}
    styles: list[Style] = []
    for placement in placements:
        count = seen.get(placement, 0)
        seen[placement] = count + 1
        base = PLACEMENT_STYLES.get(placement, OWN_STYLE)
        styles.append(Style(base.color, base.marker, _DASHES[count % len(_DASHES)]))
    return styles


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours `#rrggbb` by WCAG 2, from 1 to 21."""
    high, low = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    channels = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
