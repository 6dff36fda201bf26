"""The cost of a probed step against a plain one, and its average over a run; the trainer's own steps in turn."""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from _record import write_result
from sdd.probing import Probe
from sdd.train import RunConfig, Trainer, preset
from sdd.train.config_io import find_placement
from sdd.train.run_dir import RunDir

EVERY = 50
UNTIMED = 2


def configured(name: str, args: argparse.Namespace) -> RunConfig:
    base = preset(name)
    model = replace(base.model, placement=find_placement(args.placement))
    return replace(base, model=model, threads=args.threads, device=args.device, eval_sequences=1, probe_every=0)


def seconds(trainer: Trainer, probe: Probe, step: int, probed: bool) -> float:
    """Of one step, until its row is written or not due."""
    began = time.perf_counter()
    with probe.step(trainer.optimizer, number=EVERY if probed else EVERY + 1):
        loss, _ = trainer.train_step(step)
    loss.item()
    probe.flush()
    return time.perf_counter() - began


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Plain and probed steps in turn."""
    found: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(configured(name, args), RunDir(Path(folder)))
        trainer.probe = probe = Probe(trainer.model, every=EVERY, out=Path(folder) / "probe.jsonl")
        for step in range(2 * (args.rounds + UNTIMED)):
            took = seconds(trainer, probe, step, probed=bool(step % 2))
            if step >= 2 * UNTIMED:
                found[bool(step % 2)].append(took)
        bytes_a_row = (Path(folder) / "probe.jsonl").stat().st_size // (args.rounds + UNTIMED)
    plain, probed = (statistics.median(found[kind]) for kind in (False, True))
    return {
        "plain_seconds": found[False],
        "probed_seconds": found[True],
        "probed_over_plain": probed / plain,
        f"mean_cost_percent_every_{EVERY}": 100 * (probed / plain - 1) / EVERY,
        "bytes_a_row": bytes_a_row,
    }


def main() -> None:
    """Measure and write benchmarks/results/probe_cost.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", default="nano,micro")
    parser.add_argument("--placement", default="sdd-released", help="the one with the most sites")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    results = {}
    for name in args.presets.split(","):
        results[name] = found = measure(name, args)
        print(
            f"{name}: a probed step takes {found['probed_over_plain']:.2f} of a plain one; every {EVERY} steps that is "
            f"{found[f'mean_cost_percent_every_{EVERY}']:.2f}% on average",
            flush=True,
        )
    torch.set_num_threads(args.threads)
    file = write_result(
        "probe_cost",
        {
            "what": "wall time of a probed step over that of a plain one, eager, medians of steps in turn",
            "placement": args.placement,
            "presets": results,
        },
    )
    print(f"written to {file}")


if __name__ == "__main__":
    main()
