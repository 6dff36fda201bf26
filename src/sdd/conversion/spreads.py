"""Numbers of many layers as a short table: one line for the same layer of all blocks."""

import re
from collections.abc import Iterable, Sequence
from statistics import median

from sdd.conversion.closed_form import FAR
from sdd.conversion.observe import ObservedLayer
from sdd.terminal import aligned


def error_lines(errors: Iterable[tuple[str, float]]) -> list[str]:
    """Least, median and largest error over the blocks, of each kind of layer."""
    header = ("error a token (median)", "least", "median", "most", "most at")
    rows = []
    for kind, members in _by_kind(errors).items():
        worst = max(members, key=lambda member: member[1])
        numbers = [error for _, error in members]
        rows.append((kind, *(f"{f(numbers):.2g}" for f in (min, median, max)), worst[0]))
    return aligned([header, *rows])


def observed_lines(layers: Sequence[ObservedLayer]) -> list[str]:
    """One line for each kind of layer: how its scale behaves, and the error that calibration would leave."""
    distinct = len({layer.name for layer in layers})
    header = (f"{distinct} layers observed", "rms", "spread", "sinks", "faint", "error: median", "most", "most at")
    rows = []
    for kind, members in _by_kind((layer.name, layer) for layer in layers).items():
        found = [layer for _, layer in members]
        worst = max(found, key=lambda layer: layer.error)
        middles = (median(layer.rms for layer in found), median(layer.spread for layer in found))
        sinks, faint = (sum(numbers) for numbers in zip(*((x.sinks, x.faint) for x in found), strict=True))
        error = median(layer.error for layer in found)
        at = worst.name if worst.expert is None else f"{worst.name}, expert {worst.expert}"
        rows.append((kind, *(f"{n:.3g}" for n in middles), sinks, faint, f"{error:.2g}", f"{worst.error:.2g}", at))
    note = (
        f"rms, spread (90th over 10th percentile) and sinks (tokens over {FAR:g} times the median, faint: "
        f"under 1/{FAR:g} of it) are those of W x over tokens; error is what calibration would leave with true inputs"
    )
    return [*aligned([header, *rows]), "", note]


def _by_kind(pairs: Iterable[tuple[str, object]]) -> dict[str, list]:
    kinds: dict[str, list] = {}
    for name, value in pairs:
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append((name, value))
    return kinds
