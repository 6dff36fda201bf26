"""Runs that alarms are judged by: twelve healthy ones, some that fail, and healthy mixtures of experts.

Written thinned, as fixtures of the tests. About two minutes a run on one core of 2020 or later; a run that is there is
not repeated.
"""

import argparse
import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdd.files import read_json_lines
from sdd.placement import placements
from sdd.probing import Probe, append_row
from sdd.train import RunConfig, preset
from sdd.train.trainer import start

#: Steps that are kept: dense at first, where runs break.
STEPS = (1, 2, 4, 8, 16, 30, 50, 100, 150, 200, 250, 350)
#: Statistics that no alarm needs stay out.
_LEFT_OUT = ("weight_norm", "weight_grad_rms", "eps_ratio_max")
#: (placement, peak lr, warm-up, init scale, steps). Healthy is the preset's lr of 0.004, or less where a placement
#: does not learn at that (its loss stays at that of token frequencies). An init of std 0.02 is made for models a
#: thousand wide: at 64 it is a quarter of the others', and the alarm about eps is true.
RUNS: dict[str, tuple[str, float, int, float, int]] = {
    **{
        f"healthy-{name}": (name, 4e-3, 40, 1.0, 250)
        for name in ("sdd", "sdd-paper", "sdd-released", "sdd-prenorm", "prenorm", "prenorm-qk", "qkv-norm")
    },
    "healthy-postnorm": ("postnorm", 1e-3, 40, 1.0, 250),
    "healthy-hybrid": ("hybrid", 1e-3, 40, 1.0, 250),
    "healthy-deepnorm": ("deepnorm", 5e-4, 40, 1.0, 250),
    "healthy-peri": ("peri", 4e-3, 40, 4.0, 250),
    "healthy-olmo2": ("olmo2", 4e-3, 40, 8.0, 250),
    "hard-postnorm": ("postnorm", 1e-2, 0, 1.0, 350),
    "hard-sdd": ("sdd", 1e-2, 0, 1.0, 350),
    "fast-hybrid": ("hybrid", 4e-3, 40, 1.0, 250),
    "small-olmo2": ("olmo2", 4e-3, 40, 1.0, 250),
    **{f"moe-{name}": (name, 4e-3, 40, 1.0, 400) for name in ("sdd", "sdd-prenorm", "prenorm-qk")},
}


def config_of(placement: str, lr: float, warmup: int, init_scale: float, steps: int, shape: str) -> RunConfig:
    """A run of that shape."""
    base = preset(shape)
    return replace(
        base,
        model=replace(base.model, placement=placements[placement], init_scale=init_scale),
        optim=replace(base.optim, lr=lr, warmup=warmup),
        steps=steps,
        eval_every=0,
        checkpoint_every=0,
        threads=1,
    )


def train(name: str, out: Path) -> None:
    """Train one run with a probe."""
    trainer = start(config_of(*RUNS[name], "moe-nano" if name.startswith("moe-") else "nano"), out)
    file = out / "probe.jsonl"
    with Probe(
        trainer.model,
        trainer.optimizer,
        every=1,
        out=lambda row: append_row(file, row) if row["step"] in STEPS else None,
    ):
        trainer.run()


def record(name: str, run: Path) -> dict[str, Any]:
    """A run in three significant digits: numbers of a site side by side, as they compress best."""
    rows = [row for row in read_json_lines(run / "probe.jsonl") if row["step"] in STEPS]
    metrics = [row for row in read_json_lines(run / "metrics.jsonl") if "loss" in row]
    sites = {
        site: {stat: _short([row["sites"][site][stat] for row in rows]) for stat in stats if stat not in _LEFT_OUT}
        for site, stats in rows[0]["sites"].items()
    }
    routing = {
        column: [_short(row["routing"][column]) for row in metrics]
        for column in ("entropy", "dead_experts")
        if "routing" in metrics[0]
    }
    layers = {stat: [_short(row["layers"][stat]) for row in rows] for stat in rows[0]["layers"]}
    return {
        "run": dict(zip(("placement", "lr", "warmup", "init_scale", "steps"), RUNS[name], strict=True)),
        "steps": [row["step"] for row in rows],
        "sites": {site: stats for site, stats in sites.items() if stats},
        "layers": layers,
        "loss": [float(f"{row['loss']:.4g}") for row in metrics],
        "grad_norm": [float(f"{row['grad_norm']:.3g}") for row in metrics],
        **({"routing": routing} if routing else {}),
    }


def _short(values: list[Any]) -> list[Any]:
    return [float(f"{value:.3g}") if isinstance(value, float | int) else value for value in values]


def main() -> None:
    """Train what is missing and write tests/probing/recorded/*.json.xz."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/alarms"), help="where the runs go (default runs/alarms)"
    )
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(RUNS)} (default all)")
    args = parser.parse_args()
    folder = Path(__file__).parents[1] / "tests" / "probing" / "recorded"
    folder.mkdir(exist_ok=True)
    for name in args.names or RUNS:
        run = args.runs / name
        if not (run / "result.json").exists():
            train(name, run)
        text = json.dumps(record(name, run), separators=(",", ":"))
        (folder / f"{name}.json.xz").write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main()
