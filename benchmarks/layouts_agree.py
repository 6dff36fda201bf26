"""Whether every layout of processes trains as one process does, with one of them killed on the way.

For each layout the same steps of the same run are made under torchrun. Once there is a checkpoint, the last rank is
killed (SIGKILL); torchrun starts the job again, which goes on from the checkpoint. Compared with one process:

    loss        the largest difference of the training losses of all steps, in nats
    grad_norm   the largest relative difference of gradient norms
    held_out    the difference of the held-out losses at the end, in nats
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _record import write_result

SDD = ["-m", "sdd", "train"]
DENSE = ("shard 2", "tensor 2", "context 2", "shard 2 tensor 2", "context 2 tensor 2", "replicate 2 shard 2")
MIXTURE = (
    "shard 2",
    "expert 2",
    "tensor 2",
    "context 2",
    "shard 2 expert 2",
    "expert 2 context 2",
    "expert 2 tensor 2",
)
LAYOUTS = {"nano": DENSE, "moe-nano": MIXTURE}


def options(preset: str, args: argparse.Namespace, out: Path) -> list[str]:
    """Make the command's words; the same number of passes in every layout, so that routers see the same tokens."""
    fields = {
        "steps": args.steps,
        "data.batch_size": args.batch,
        "threads": 1,
        "compile": "false",
        "eval_every": 0,
        "probe_every": 0,
        "sample_tokens": 0,
        "checkpoint_every": args.kill_after,
    }
    return [preset, "--out", str(out), *(word for name, value in fields.items() for word in (f"--{name}", str(value)))]


def rows(run: Path) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def shared(preset: str, layout: str, args: argparse.Namespace, folder: Path) -> tuple[Path, int]:
    """Make a run under torchrun with a rank killed; its folder, and the step from which it went on."""
    words = layout.split()
    sizes = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    processes = math.prod(sizes.values())
    run = folder / layout.replace(" ", "-")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    command += ["--nproc-per-node", str(processes), *SDD, *options(preset, args, run)]
    command += [word for name, size in sizes.items() for word in (f"--parallel.{name}", str(size))]
    log = folder / f"{run.name}.log"
    with log.open("w", encoding="utf-8") as stream:
        job = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            _wait(job, run / "checkpoints", log)
            os.kill(_child(job.pid, processes - 1), signal.SIGKILL)
            code = job.wait(args.timeout)
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait(60)
    if code:
        raise SystemExit(f"{preset}, {layout}: torchrun ended with {code}\n{log.read_text(encoding='utf-8')[-2000:]}")
    resumed = re.findall(r"going on from step (\d+)", log.read_text(encoding="utf-8"))
    if not resumed:
        raise SystemExit(f"{preset}, {layout}: the job ended before a rank was killed; ask for more --steps")
    return run, int(resumed[-1])


def _wait(job: "subprocess.Popen[bytes]", checkpoints: Path, log: Path) -> None:
    """Wait until there is a checkpoint."""
    end = time.monotonic() + 300
    while not any(checkpoints.glob("step-*")):
        if job.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"no checkpoint came\n{log.read_text(encoding='utf-8')[-2000:]}")
        time.sleep(0.02)


def _child(parent: int, rank: int) -> int:
    """Find the process of that rank."""
    for found in Path("/proc").glob("[0-9]*"):
        try:
            status = (found / "stat").read_text().rsplit(")", 1)[1].split()
            if int(status[1]) == parent and f"RANK={rank}" in (found / "environ").read_text().split("\0"):
                return int(found.name)
        except OSError:
            continue
    raise SystemExit(f"no process of rank {rank}")


def compared(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Compute the differences that the head of this file names."""
    mine, other = ({row["step"]: row for row in each if "loss" in row} for each in (ours, theirs))
    if mine.keys() != other.keys():
        raise SystemExit(f"steps {sorted(mine)} were made, not {sorted(other)}")
    ends = [next(row["eval_loss"] for row in reversed(each) if "eval_loss" in row) for each in (ours, theirs)]
    return {
        "loss": max(abs(mine[step]["loss"] - other[step]["loss"]) for step in other),
        "grad_norm": max(abs(mine[step]["grad_norm"] / other[step]["grad_norm"] - 1) for step in other),
        "held_out": abs(ends[0] - ends[1]),
    }


def main() -> None:
    """Run and write benchmarks/results/layouts_agree.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--presets", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--kill-after", type=int, default=8, help="a rank is killed after the checkpoint of this step")
    parser.add_argument("--timeout", type=float, default=600)
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        for preset in args.presets:
            folder = Path(name) / preset
            folder.mkdir()
            words = [sys.executable, *SDD, *options(preset, args, folder / "alone")]
            subprocess.run(words, check=True, capture_output=True)
            for layout in LAYOUTS[preset]:
                run, resumed = shared(preset, layout, args, folder)
                row = {"preset": preset, "layout": layout, "resumed_from": resumed}
                row |= compared(rows(run), rows(folder / "alone"))
                found.append(row)
                print(*(f"{key} {value:.1e}" if isinstance(value, float) else value for key, value in row.items()))
    what = "training steps under torchrun with a rank killed on the way, against one process"
    path = write_result("layouts_agree", {"what": what, "steps": args.steps, "batch": args.batch, "rows": found})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
