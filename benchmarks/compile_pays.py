"""After how many tokens `--compile true` has paid on a CPU, and what bfloat16 gains there, from whole runs in turn.

Each run is a process of `sdd train` with an empty cache of compiled code. With s the median seconds of a step and w the
seconds of a whole process of n steps,

    compile seconds    w(compiled) - w(eager) + n (s(eager) - s(compiled))
    break-even steps   compile seconds / (s(eager) - s(compiled))

Compiling the forward pass of the evaluation is part of it. `sdd.train.compiling` estimates from these numbers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from _record import write_result
from sdd.models.flops import training_flops
from sdd.train import preset

UNTIMED = 3
STEPS = {"nano": 60, "moe-nano": 60, "micro": 12}
WHOLE = ["--eval_every", "0", "--checkpoint_every", "0", "--probe_every", "0", "--sample_tokens", "0"]


def measure(name: str, precision: str, compiled: bool, threads: int) -> dict[str, float]:
    """Seconds of the whole process, and the median seconds of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        numbers = ["--steps", str(STEPS[name]), "--threads", str(threads)]
        kind = ["--compile", str(compiled).lower(), "--precision", precision]
        command = [sys.executable, "-m", "sdd", "train", name, "--out", str(out), *numbers, *kind, *WHOLE]
        began = time.perf_counter()
        environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        subprocess.run(command, check=True, capture_output=True, env=environ)
        whole = time.perf_counter() - began
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tokens = preset(name).tokens_per_step
    steps = [tokens / row["tokens_per_second"] for row in rows if "loss" in row]
    return {"process_seconds": whole, "step_seconds": statistics.median(steps[UNTIMED:])}


def compare(name: str, precision: str, threads: int) -> dict[str, Any]:
    """Eager and compiled runs of a preset, and after how many steps the compilation has paid."""
    eager, compiled = (measure(name, precision, mode, threads) for mode in (False, True))
    config, gain = preset(name), eager["step_seconds"] - compiled["step_seconds"]
    seconds = compiled["process_seconds"] - eager["process_seconds"] + STEPS[name] * gain
    even = seconds / gain if gain > 0 else None
    return {
        "preset": name,
        "precision": precision,
        "n_layers": config.model.n_layers,
        "flops_per_step": config.tokens_per_step * training_flops(config.model).model,
        "eager": eager,
        "compiled": compiled,
        "compile_seconds": seconds,
        "step_ratio": compiled["step_seconds"] / eager["step_seconds"],
        "break_even_steps": even,
        "break_even_tokens": even and even * config.tokens_per_step,
    }


def main() -> None:
    """Measure and write benchmarks/results/compile_pays_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.presets:
        for precision in ("float32", "bfloat16"):
            rows.append(row := compare(name, precision, args.threads))
            even = row["break_even_steps"]
            print(
                f"{name} {precision}: step {row['eager']['step_seconds']:.3f} s eager, "
                f"{row['compiled']['step_seconds']:.3f} s compiled; compiling takes {row['compile_seconds']:.0f} s"
                + (f", paid after {even:,.0f} steps" if even else ", and never pays"),
                flush=True,
            )
    what = "eager and compiled runs of `sdd train` on a CPU: steps, compile time, and when that has paid"
    print(f"written to {write_result('compile_pays_cpu', {'what': what, 'rows': rows})}")


if __name__ == "__main__":
    main()
