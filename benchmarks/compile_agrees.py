"""Whether compiled runs give the answer of eager ones: held-out losses of the same seeds, beside the spread of seeds.

Compiled code rounds in another order, and what is rounded differently grows from step to step: two runs of one seed
part. The question is whether they part by more than two seeds do. With e and c the losses of eager and compiled runs,

    noise   root of the mean of (c - e)^2 / 2 over seeds: what compiling adds to a loss, as a standard deviation
    shift   mean of c - e with its 95% interval: whether compiled runs end higher or lower
    spread  standard deviation of e between seeds
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from _record import write_result
from sdd.lab.statistics import paired_difference
from sdd.train import preset

QUIET = ["--eval_every", "0", "--checkpoint_every", "0", "--probe_every", "0", "--sample_tokens", "0"]


def loss(name: str, placement: str, seed: int, steps: int, compiled: bool, more: list[str]) -> float:
    """The held-out loss at the end of a run of `sdd train`; nan if it diverged."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        numbers = ["--placement", placement, "--seed", str(seed), "--steps", str(steps), "--threads", "1"]
        command = [sys.executable, "-m", "sdd", "train", name, "--out", str(out), *numbers, *QUIET, *more]
        done = subprocess.run([*command, "--compile", str(compiled).lower()], capture_output=True, text=True)
        if done.returncode not in (0, 3):
            raise SystemExit(f"sdd train ended with {done.returncode}: {done.stderr[-500:]}")
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return next((float(row["eval_loss"]) for row in reversed(rows) if "eval_loss" in row), math.nan)


def compared(eager: dict[int, float], compiled: dict[int, float]) -> dict[str, Any]:
    """Noise, shift and spread, and the losses themselves."""
    apart = np.array([compiled[seed] - one for seed, one in eager.items()])
    shift = paired_difference(compiled, eager)
    spread = float(np.std(list(eager.values()), ddof=1)) if len(eager) > 1 else math.nan
    noise = float(np.sqrt(np.mean(apart**2) / 2))
    return {
        "eager": eager,
        "compiled": compiled,
        "noise": noise,
        "shift": shift.value,
        "shift_interval": [shift.low, shift.high],
        "spread": spread,
        "noise_over_spread": noise / spread if spread else math.nan,
    }


def main() -> None:
    """Run and write benchmarks/results/compile_agrees_cpu.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--placements", nargs="+", default=["sdd", "prenorm-qk", "peri"])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=586, help="default: 0.3M tokens of nano")
    args, more = parser.parse_known_args()
    rows = []
    for placement in args.placements:
        losses: dict[bool, dict[int, float]] = {False: {}, True: {}}
        for seed in range(args.seeds):
            for mode, found in losses.items():
                found[seed] = loss(args.preset, placement, seed, args.steps, mode, more)
        row = {"placement": placement, **compared(losses[False], losses[True])}
        rows.append(row)
        print(
            f"{placement}: compiled minus eager {row['shift']:+.4f} nats, noise {row['noise']:.4f}, between seeds "
            f"{row['spread']:.4f}",
            flush=True,
        )
    what = "held-out losses of eager and compiled runs of the same seeds, beside the spread between seeds"
    tokens = args.steps * preset(args.preset).tokens_per_step
    values = {"what": what, "preset": args.preset, "steps": args.steps, "tokens": tokens, "options": more, "rows": rows}
    print(f"written to {write_result('compile_agrees_cpu', values)}")


if __name__ == "__main__":
    main()
