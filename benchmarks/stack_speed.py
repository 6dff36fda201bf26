"""What a stack gains: tokens a second of R runs that step as one, against one run that steps alone.

    gain(R) = tokens a second of a stack of R / tokens a second of one ordinary run

Both take whole steps (batches, forward and backward passes, clipping, AdamW) on the same data, in turn in one process.
On a GPU a stack's step is a CUDA graph, as in a study.
"""

import argparse
import statistics
from collections.abc import Callable

import torch

from _record import write_result
from _steps import UNTIMED
from sdd.bench.timing import free, turned, wall_seconds
from sdd.train import RunConfig, config_io, preset
from sdd.train.learner import Learner
from sdd.train.optim import clip_gradients
from sdd.train.parallel import ALONE, pick_device
from sdd.train.stacked import Stack

#: Steps of a turn.
STEPS = 2


def alone(config: RunConfig) -> Callable[[], None]:
    """Steps of an ordinary run."""
    learner = Learner(config, ALONE)

    def turn() -> None:
        for step in range(STEPS):
            learner.backward(step).item()
            clip_gradients(learner.model, config.optim.grad_clip).item()
            learner.update()

    return turn


def stacked(config: RunConfig, size: int) -> Callable[[], None]:
    """Steps of a stack of that size."""
    changed = ({"seed": seed, "optim.lr": config.optim.lr / (seed + 1)} for seed in range(size))
    stack = Stack([Learner(config_io.with_overrides(config, each), ALONE) for each in changed])

    def turn() -> None:
        stack.advance(0, STEPS).tolist()

    return turn


def measure(config: RunConfig, sizes: list[int], rounds: int) -> list[dict[str, float | bool]]:
    """Tokens a second of a run and of stacks of every size, eager or compiled as the config says."""
    device = pick_device(config.device)
    variants = {0: alone(config), **{size: stacked(config, size) for size in sizes}}
    seconds: dict[int, list[float]] = {size: [] for size in variants}
    for index in range(UNTIMED + rounds):
        for size, turn in turned(list(variants.items()), index):
            seconds[size].append(wall_seconds(turn, device))
    free(device)
    kept = {size: found[UNTIMED:] for size, found in seconds.items()}
    rows = []
    for size, found in kept.items():
        runs = max(size, 1)
        gains = [runs * base / own for own, base in zip(found, kept[0], strict=True)]
        rate = runs * STEPS * config.tokens_per_step / statistics.median(found)
        row = {"runs": size, "compiled": bool(config.compile), "tokens_per_second": rate}
        rows.append({**row, "gain": statistics.median(gains)})
        name = f"a stack of {size}" if size else "one run alone"
        how, gain = "compiled" if config.compile else "eager", statistics.median(gains)
        print(f"{how}, {name}: {rate:,.0f} tokens/s, x{gain:.2f}", flush=True)
    return rows


def main() -> None:
    """Measure and write benchmarks/results/stack_speed_DEVICE.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fixed = {"precision": "float32", "probe_every": 0, "sample_tokens": 0, "guard.nonfinite": "stop"}
    config = config_io.with_overrides(preset(args.preset), {**fixed, "device": args.device})
    rows = []
    for compiled in (False, True):
        rows += measure(config_io.with_overrides(config, {"compile": compiled}), args.sizes, args.rounds)
    device = pick_device(args.device).type
    values = {"what": "steps of runs in a stack and alone", "preset": args.preset, "device": device, "rows": rows}
    print(f"written to {write_result(f'stack_speed_{device}', values)}")


if __name__ == "__main__":
    main()
