"""`sdd train micro` against the same architecture as one bare PyTorch script, tokens/s, interleaved processes."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _record import write_result
from sdd.data import classics

UNTIMED = 4


def ours(steps: int, threads: int, out: Path) -> float:
    """Tokens/s of the real command, by the clock of its metrics, logging included, without the first steps."""
    command = [sys.executable, "-m", "sdd", "train", "micro", "--out", str(out), "--steps", str(steps)]
    fixed = ["--eval_every", "0", "--eval_sequences", "1", "--checkpoint_every", "0", "--sample_tokens", "0"]
    subprocess.run([*command, *fixed, "--threads", str(threads)], check=True, capture_output=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row][UNTIMED - 1 :]
    return (rows[-1]["tokens"] - rows[0]["tokens"]) / (rows[-1]["time"] - rows[0]["time"])


def bare(steps: int, threads: int, tokens: Path) -> float:
    """Tokens/s of the bare script."""
    script = Path(__file__).with_name("_bare_micro.py")
    numbers = ["--steps", str(steps), "--untimed", str(UNTIMED), "--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, str(script), str(tokens), *numbers], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)["tokens_per_second"]


def main() -> None:
    """Measure and write benchmarks/results/train_overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    tokens = classics()[0].path
    found: dict[str, list[float]] = {"sdd": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(args.rounds):
            found["sdd"].append(ours(args.steps, args.threads, Path(folder) / str(index)))
            found["bare"].append(bare(args.steps, args.threads, tokens))
            print(f"round {index + 1}: sdd {found['sdd'][-1]:,.0f}, bare {found['bare'][-1]:,.0f} tokens/s", flush=True)
    ratios = [one / other for one, other in zip(found["sdd"], found["bare"], strict=True)]
    ratio = statistics.median(ratios)
    file = write_result(
        "train_overhead",
        {
            "what": "tokens/s of `sdd train micro` over those of the bare script, whole processes in turn",
            "tokens_per_second": found,
            "ratios": ratios,
            "median_ratio": ratio,
        },
    )
    print(f"median ratio {ratio:.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}), written to {file}")


if __name__ == "__main__":
    main()
