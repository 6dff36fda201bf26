"""How long a checkpoint stalls the training, written while it waits or beside it; the trainer's own steps, in turn."""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from _record import write_result
from sdd.models import count_parameters
from sdd.train import Trainer, preset
from sdd.train.run_dir import RunDir

#: Small models with wide layers: a checkpoint's size matters here, not what the model would learn.
SIZES = {
    "5M": {"n_layers": 4, "d_model": 256, "d_ff": 704, "n_heads": 4, "n_kv_heads": 4, "context": 128},
    "30M": {"n_layers": 8, "d_model": 512, "d_ff": 1408, "n_heads": 8, "n_kv_heads": 8, "context": 128},
}
WAYS = ("none", "waiting", "beside")


def trainer_of(size: str, folder: Path, args: argparse.Namespace) -> Trainer:
    """A run of a size, whose checkpoints may be written either way."""
    base = preset("nano")
    config = replace(
        base,
        model=replace(base.model, **SIZES[size]),
        data=replace(base.data, batch_size=args.batch),
        checkpoint_async=True,
        compile=False,
        eval_sequences=1,
        keep_checkpoints=1,
        threads=args.threads,
        device=args.device,
    )
    return Trainer(config, RunDir(folder))


def seconds(trainer: Trainer, way: str, steps: int) -> tuple[float, float]:
    """Of a checkpoint, until the training goes on, and of that and the steps after it.

    A checkpoint beside the training may end later than the steps; what is left of it is waited for and not counted.
    """
    began = time.perf_counter()
    if way == "waiting":
        trainer.save()
    elif way == "beside":
        trainer.save_beside()
    stalled = time.perf_counter() - began
    for _ in range(steps):
        loss, _ = trainer.train_step(trainer.step)
        loss.item()
        trainer.step += 1
    took = time.perf_counter() - began
    trainer.saver.finish()
    return stalled, took


def measure(size: str, args: argparse.Namespace) -> dict[str, object]:
    """Rounds of all ways in turn, each round in another order."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        trainer = trainer_of(size, Path(folder), args)
        for number in range(args.rounds + 1):
            for place in range(len(WAYS)):
                way = WAYS[(number + place) % len(WAYS)]
                took = seconds(trainer, way, args.steps)
                if number:  # the first round is not counted
                    found[way].append(took)
        size_on_disk = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    stalls = {way: [stall for stall, _ in found[way]] for way in WAYS[1:]}
    totals = {way: [total for _, total in found[way]] for way in WAYS}
    extra = {way: [one - none for one, none in zip(totals[way], totals["none"], strict=True)] for way in WAYS[1:]}
    return {
        "parameters": count_parameters(trainer.config.model).total,
        "checkpoint_bytes": size_on_disk,
        "steps": args.steps,
        "stall_seconds": stalls,
        "round_seconds": totals,
        "median_stall": {way: statistics.median(values) for way, values in stalls.items()},
        "median_extra": {way: statistics.median(values) for way, values in extra.items()},
        "stall_waiting_over_beside": statistics.median(
            one / other for one, other in zip(stalls["waiting"], stalls["beside"], strict=True)
        ),
    }


def main() -> None:
    """Measure and write benchmarks/results/checkpoint_stall.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", help="where the checkpoints are written; the system's temporary folder by default")
    args = parser.parse_args()
    sizes = {size: measure(size, args) for size in args.sizes}
    what = (
        "seconds that a checkpoint holds up the training (stall), and by which it and the steps after it take longer "
        "than the steps alone (extra): written while the training waits, and by a thread beside it; rounds in turn"
    )
    file = write_result("checkpoint_stall", {"what": what, "threads": args.threads, "sizes": sizes})
    for size, found in sizes.items():
        print(f"{size}: stall {found['median_stall']}, extra {found['median_extra']} seconds")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
