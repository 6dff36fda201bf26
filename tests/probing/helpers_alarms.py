"""Runs for the tests of alarms: drawn ones, and recorded ones."""

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np

RECORDED = Path(__file__).parent / "recorded"
STEPS = [1, 2, 4, 8, 16, *range(32, 257, 16)]
Rows = list[dict[str, Any]]


class DrawnRun:
    """A healthy run with noise, in which faults can be put; rows of both files.

    Args:
        seed: of the noise.
        n_blocks: depth.
        noise: standard deviation of the logarithm of every number.
        slope: by what the stream's gradient is multiplied from the last block down to the first.
    """

    def __init__(self, seed: int, n_blocks: int, noise: float = 0.1, slope: float = 1.0) -> None:
        self.rng, self.n_blocks, self.noise = np.random.default_rng(seed), n_blocks, noise
        self.probe: Rows = [self._row(step, slope) for step in STEPS]
        losses = 5.5 + 3 * np.exp(-np.arange(STEPS[-1]) / 60) + 0.1 * self.rng.standard_normal(STEPS[-1])
        norms = self._drawn(0.7, STEPS[-1])
        pairs = enumerate(zip(losses, norms, strict=True), 1)
        self.metrics: Rows = [{"step": step, "loss": float(x), "grad_norm": float(y)} for step, (x, y) in pairs]

    def site(self, row: int, name: str) -> dict[str, float]:
        """The statistics of a site in one row, to be changed."""
        return self.probe[row]["sites"][name]

    def _row(self, step: int, slope: float) -> dict[str, Any]:
        decay = np.exp(-step / 100)
        sites: dict[str, dict[str, float]] = {"embed": self._matrix(decay)}
        for block in range(self.n_blocks):
            at = f"blocks.{block}"
            sites[f"{at}.attn"] = {"logit_max": self._one(20 / (1 + 4 * decay)), "entropy": self._one(2.5)}
            sites[f"{at}.attn.o_proj"] = self._matrix(decay) | self._norm()
            sites[f"{at}.ffn.up_proj"] = self._matrix(decay)
        depth = np.linspace(1, 0, self.n_blocks + 1)
        layers = {
            "rms": self._drawn(np.exp(2 * (1 - depth))).tolist(),
            "cosine": self._drawn(np.full(self.n_blocks, 0.9)).tolist(),
            "grad_rms": self._drawn(1e-4 * decay * slope**depth / np.exp(2 * (1 - depth))).tolist(),
        }
        return {"step": step, "sites": sites, "layers": layers}

    def _matrix(self, decay: float) -> dict[str, float]:
        return {
            "rms": self._one(1.0),
            "grad_rms": self._one(1e-4 * decay),
            "weight_norm": self._one(5.0),
            "weight_grad_rms": self._one(1e-3 * decay),
            "update_ratio": self._one(0.03 * decay),
            "angle": self._one(0.03 * decay),
        }

    def _norm(self) -> dict[str, float]:
        numbers = {"eps_ratio": 1e-4, "eps_ratio_max": 1e-3, "alpha_norm": 8.0, "alpha_grad_rms": 1e-3}
        return {name: self._one(value) for name, value in numbers.items()}

    def _one(self, value: float) -> float:
        return float(self._drawn(value, ()))

    def _drawn(self, value: Any, shape: Any = None) -> np.ndarray:
        shape = np.shape(value) if shape is None else shape
        return value * np.exp(self.noise * self.rng.standard_normal(shape).clip(-4, 4))


def recorded(name: str) -> tuple[Rows, Rows]:
    """The rows of probe.jsonl and metrics.jsonl of a run that `benchmarks/alarm_runs.py` recorded."""
    run = json.loads(lzma.decompress((RECORDED / f"{name}.json.xz").read_bytes()))
    probe = [
        {
            "step": step,
            "sites": {site: {s: v[i] for s, v in stats.items()} for site, stats in run["sites"].items()},
            "layers": {stat: values[i] for stat, values in run["layers"].items()},
        }
        for i, step in enumerate(run["steps"])
    ]
    pairs = enumerate(zip(run["loss"], run["grad_norm"], strict=True), 1)
    metrics: Rows = [{"step": step, "loss": loss, "grad_norm": norm} for step, (loss, norm) in pairs]
    for column, values in run.get("routing", {}).items():
        for row, by_layer in zip(metrics, values, strict=True):
            row.setdefault("routing", {})[column] = by_layer
    return probe, metrics
