"""From the sums of a step to the numbers of a row."""

import math
from collections.abc import Mapping

from sdd.probing.rows import LAYER_STATISTICS, STATISTICS, Row, compact
from sdd.probing.tally import Key
from sdd.probing.weights import angle

#: Sums with their counts.
Sums = Mapping[Key, tuple[float, float]]
# a place in the residual stream is no site; the colon keeps it apart from the names of modules
_LAYER = "layer:"


def layer_name(index: int) -> str:
    """What a tally calls the residual stream before block `index`, counted from 0."""
    return f"{_LAYER}{index}"


def make_row(step: int, sums: Sums, maxima: Mapping[Key, float], order: Mapping[str, int], processes: int = 1) -> Row:
    """The row of a step.

    Args:
        step: its number.
        sums: over all tokens and processes; of what no token passed through, the count is 0.
        maxima: likewise, -inf there.
        order: the place of each site; others follow by name.
        processes: whose losses were averaged: each one's gradients by outputs are this much larger.
    """
    names: dict[str, dict[str, float]] = {}
    for (name, stat), (total, count) in sums.items():
        if count:
            scale = processes if stat == "grad_rms" else 1
            names.setdefault(name, {})[stat] = _value(stat, total, count) / scale
    for (name, stat), value in maxima.items():
        if value != -math.inf:
            names.setdefault(name, {})[stat] = value
    for (name, stat), (step_square, _) in sums.items():
        if stat == "step" and "weight_norm" in names.get(name, {}):
            square, radial = sums[name, "weight_norm"][0], sums[name, "radial"][0]
            names[name]["update_ratio"] = math.sqrt(_ratio(step_square, square))
            names[name]["angle"] = angle(square, step_square, radial)
    sites = sorted(
        (name for name in names if not name.startswith(_LAYER)), key=lambda name: (order.get(name, len(order)), name)
    )
    row = {
        "step": step,
        "sites": {name: {stat: names[name][stat] for stat in STATISTICS if stat in names[name]} for name in sites},
        "layers": _layers(names),
    }
    return compact(row)


def _layers(names: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """Each statistic of the residual stream, from the first layer on."""
    stream = [names[layer_name(index)] for index in range(len(names)) if layer_name(index) in names]
    found = {stat: [layer[stat] for layer in stream if stat in layer] for stat in LAYER_STATISTICS}
    return {stat: values for stat, values in found.items() if values}


def _value(stat: str, total: float, count: float) -> float:
    """What a sum becomes: a root mean square, a norm, or a mean."""
    if stat.endswith("rms"):
        return math.sqrt(total / count)
    return math.sqrt(total) if stat.endswith("norm") else total / count


def _ratio(numerator: float, denominator: float) -> float:
    if denominator:
        return numerator / denominator
    return math.inf if numerator > 0 else math.nan
