"""The file of a probe, `probe.jsonl`: its statistics, how a row is made, and how the file is read.

One object a probed step, numbers with five significant digits:

    {"step": 50,
     "sites": {"blocks.0.attn.q_proj": {"rms": 0.98, "grad_rms": 2.1e-05, "eps_ratio": 1.3e-06, ...}, ...},
     "layers": {"rms": [1.0, 1.02, ...], "cosine": [0.93, ...], "grad_rms": [3e-05, ...]}}

A site of this file is a place that has statistics. It is named after

- a module that has parameters of its own, or a norm: its dotted name;
- a matrix that is not its module's `weight`: the name of the parameter;
- a module that attends, for the statistics of attention;
- "logits", in our models.

Sites stand in the order of the model. Each holds those statistics of `STATISTICS` that exist there, and the same ones
in every row. `layers` is the residual stream: `rms` and `grad_rms` have L+1 numbers for L blocks (the input of the
first block, then the output of each block), `cosine` has L, from each layer to the next.

A number that is not finite is one of the strings "nan", "inf", "-inf". Where two rows have the same step, the last one
counts: a resumed loop writes its first steps again.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sdd.files import finite, read_json_lines
from sdd.probing.sums import Key
from sdd.probing.updates import angle, update_ratio

Row = dict[str, Any]

#: The statistics of a site, with their formulas. Sums run over all tokens of the step, on all processes.
STATISTICS: Mapping[str, str] = MappingProxyType(
    {
        "rms": "root mean square of the output, sqrt(mean(y^2))",
        "grad_rms": "root mean square of the loss gradient by the output, sqrt(mean((dL/dy)^2))",
        "eps_ratio": "mean over rows and norm groups of eps / mean(z^2); of a LayerNorm, eps / variance",
        "eps_ratio_max": "the largest of these ratios",
        "weight_norm": "Frobenius norm of the matrix before the update",
        "weight_grad_rms": "root mean square of the matrix's gradient",
        "update_ratio": "||dW|| / ||W|| of the optimiser step",
        "angle": "angle between the matrix before and after the optimiser step, radians",
        "alpha_norm": "norm of alpha, or of a norm's scale, before the update",
        "alpha_grad_rms": "root mean square of alpha's gradient",
        "logit_max": "largest attention logit of the sampled rows, after scale and mask",
        "entropy": "mean entropy of the attention weights of the sampled rows, nats",
    }
)
#: The statistics of the residual stream, layer by layer.
LAYER_STATISTICS: Mapping[str, str] = MappingProxyType(
    {
        "rms": "root mean square of the residual stream",
        "cosine": "mean over tokens of the cosine between a layer's stream and the next layer's",
        "grad_rms": "root mean square of the loss gradient by the residual stream",
    }
)
_DIGITS = 5
# A place in the residual stream is not a site. The colon keeps it apart from the names of modules.
_LAYER = "layer:"


@dataclass(frozen=True)
class ProbeHistory:
    """A probe.jsonl as arrays.

    Attributes:
        steps: int64 `[S]`, ascending.
        sites: N names, in the model's order.
        stats: by statistic, float64 `[S, N]`; nan where a site lacks it (see `has`) or where it is not a number.
        layers: by statistic, float64 `[S, L+1]` (`cosine`: `[S, L]`).
        present: by statistic, bool `[N]`: the sites that have it.
    """

    steps: np.ndarray
    sites: tuple[str, ...]
    stats: Mapping[str, np.ndarray]
    layers: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]

    def has(self, stat: str) -> tuple[str, ...]:
        """The names of the sites that have a statistic."""
        there = self.present.get(stat, np.zeros(len(self.sites), bool))
        return tuple(name for name, found in zip(self.sites, there, strict=True) if found)

    def series(self, site: str, stat: str) -> np.ndarray:
        """One statistic of one site over the steps, float64 `[S]`.

        Raises:
            KeyError: if the site does not have it.
        """
        if site not in self.has(stat):
            raise KeyError(f"{site} has no {stat}")
        return self.stats[stat][:, self.sites.index(site)]


def read_probe(file: Path) -> ProbeHistory:
    """Read a probe.jsonl; a last line that a killed process left unfinished is ignored.

    Raises:
        OSError: if it cannot be read.
    """
    rows = {row["step"]: row for row in read_json_lines(file) if "step" in row}
    return history([rows[step] for step in sorted(rows)])


def history(rows: list[Row]) -> ProbeHistory:
    """Turn rows of ascending steps into arrays."""
    sites = {name: index for index, name in enumerate(dict.fromkeys(name for row in rows for name in row["sites"]))}
    stats: dict[str, np.ndarray] = defaultdict(lambda: np.full((len(rows), len(sites)), math.nan))
    present: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(sites), bool))
    for s, row in enumerate(rows):
        for name, values in row["sites"].items():
            for stat, value in values.items():
                stats[stat][s, sites[name]] = float(value)
                present[stat][sites[name]] = True
    layers = {
        stat: np.array([[float(value) for value in row["layers"][stat]] for row in rows], np.float64)
        for stat in (rows[0]["layers"] if rows else ())
    }
    steps = np.array([row["step"] for row in rows], np.int64)
    return ProbeHistory(steps, tuple(sites), dict(stats), layers, dict(present))


def append_row(file: Path, row: Row) -> None:
    """Append one row, with five significant digits and in strict JSON."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(finite(row, _DIGITS)) + "\n")


def layer_name(index: int) -> str:
    """The name in a `Key` of the residual stream before block `index`, counted from 0."""
    return f"{_LAYER}{index}"


def make_row(
    step: int,
    sums: Mapping[Key, tuple[float, float]],
    maxima: Mapping[Key, float],
    order: Mapping[str, int],
    processes: int = 1,
) -> Row:
    """Make the row of a step from its sums.

    Args:
        step: its number.
        sums: sums and counts over all tokens and processes; the count is 0 where no token passed.
        maxima: maxima over the same, -inf where no token passed.
        order: the place of each site; others follow by name.
        processes: the number of processes over whose losses the mean was taken. Gradients by outputs are divided by
            it, since each process differentiates its own loss.
    """
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for (name, stat), (total, count) in sums.items():
        if count:
            found[name][stat] = _value(stat, total, count) / (processes if stat == "grad_rms" else 1)
    for (name, stat), value in maxima.items():
        if value != -math.inf:
            found[name][stat] = value
    for name, stats in found.items():
        if stats.keys() >= {"step", "weight_norm"}:
            square, step_square, radial = (sums[name, stat][0] for stat in ("weight_norm", "step", "radial"))
            stats["update_ratio"] = update_ratio(square, step_square)
            stats["angle"] = angle(square, step_square, radial)
    sites = [name for name in found if not name.startswith(_LAYER)]
    sites.sort(key=lambda name: (order.get(name, len(order)), name))
    stream = [found[layer_name(index)] for index in range(len(found)) if layer_name(index) in found]
    layers = {stat: [layer[stat] for layer in stream if stat in layer] for stat in LAYER_STATISTICS}
    row = {
        "step": step,
        "sites": {name: {stat: found[name][stat] for stat in STATISTICS if stat in found[name]} for name in sites},
        "layers": {stat: values for stat, values in layers.items() if values},
    }
    return finite(row, _DIGITS)


def _value(stat: str, total: float, count: float) -> float:
    """A root mean square, a norm, or a mean, by the statistic's name."""
    if stat.endswith("rms"):
        return math.sqrt(total / count)
    return math.sqrt(total) if stat.endswith("norm") else total / count
