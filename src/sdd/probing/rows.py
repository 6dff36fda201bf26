"""What a probe writes, `probe.jsonl`, and how to read it.

One object a probed step, numbers with five significant digits:

    {"step": 50,
     "sites": {"blocks.0.attn.q_proj": {"rms": 0.98, "grad_rms": 2.1e-05, "eps_ratio": 1.3e-06, ...}, ...},
     "layers": {"rms": [1.0, 1.02, ...], "cosine": [0.93, ...], "grad_rms": [3e-05, ...]}}

A site is a module that has parameters of its own, by its dotted name; a matrix that is not its module's `weight`, by
the name of the parameter; the module that attends, for the statistics of attention; and "logits" in our models. Sites
stand in the order of the model. Each holds those statistics of `STATISTICS` that exist there, and the same ones in
every row. `layers` is the residual stream: `rms` and `grad_rms` have L+1 numbers for L blocks (what the first block
reads, then what each block writes), `cosine` has L, from each layer to the next.

A number that is not finite is one of the strings "nan", "inf", "-inf". A step that stands twice counts as it stands
last: a resumed loop writes it again.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

Row = dict[str, Any]

#: What is recorded at a site, with its formula. Sums run over all tokens of the step, on all processes.
STATISTICS: Mapping[str, str] = MappingProxyType(
    {
        "rms": "root mean square of the output, sqrt(mean(y^2))",
        "grad_rms": "root mean square of the loss gradient by the output, sqrt(mean((dL/dy)^2))",
        "eps_ratio": "mean over rows and norm groups of eps / mean(z^2); variance for a LayerNorm",
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
#: What is recorded of the residual stream, layer by layer.
LAYER_STATISTICS: Mapping[str, str] = MappingProxyType(
    {
        "rms": "root mean square of the residual stream",
        "cosine": "mean over tokens of the cosine between a layer's stream and the next layer's",
        "grad_rms": "root mean square of the loss gradient by the residual stream",
    }
)


@dataclass(frozen=True)
class ProbeHistory:
    """A probe.jsonl as arrays.

    Attributes:
        steps: int64 `[S]`, ascending.
        sites: N names, in the model's order.
        stats: by statistic, float64 `[S, N]`; nan where a site has none (see `has`) or where it is not a number.
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
    """Read a probe.jsonl; a last line that a killed process left unfinished is passed over.

    Raises:
        OSError: if it cannot be read.
    """
    rows = {row["step"]: row for row in _objects(file) if "step" in row}
    return history([rows[step] for step in sorted(rows)])


def history(rows: list[Row]) -> ProbeHistory:
    """Rows of ascending steps as arrays."""
    sites = tuple(dict.fromkeys(name for row in rows for name in row["sites"]))
    index = {name: i for i, name in enumerate(sites)}
    stats: dict[str, np.ndarray] = {}
    present: dict[str, np.ndarray] = {}
    for s, row in enumerate(rows):
        for name, values in row["sites"].items():
            for stat, value in values.items():
                if stat not in stats:
                    stats[stat] = np.full((len(rows), len(sites)), math.nan)
                    present[stat] = np.zeros(len(sites), bool)
                stats[stat][s, index[name]] = float(value)
                present[stat][index[name]] = True
    layers = {
        stat: np.array([[float(value) for value in row["layers"][stat]] for row in rows], np.float64)
        for stat in (rows[0]["layers"] if rows else ())
    }
    return ProbeHistory(np.array([row["step"] for row in rows], np.int64), sites, stats, layers, present)


def append_row(file: Path, row: Row) -> None:
    """Append one row, as `compact` makes it."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def compact(value: Any) -> Any:
    """The same with five significant digits, and strings for what JSON has no number for."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: compact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [compact(item) for item in value]
    return value


def _objects(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def number(value: Any) -> float:
    """A number of a JSON file as float; "nan", "inf" and "-inf" are numbers, anything else is nan."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
