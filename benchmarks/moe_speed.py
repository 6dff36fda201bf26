"""Training tokens/s of `moe-nano` over a dense model with as many active parameters, on a CPU, steps in turn."""

import argparse
import statistics
from dataclasses import replace

import torch

from _record import write_result
from _steps import Steps, in_turn, ratio_summary
from sdd.models import LanguageModel, count_parameters, model_presets
from sdd.train.config_io import find_placement

MODELS = {"dense": model_presets["nano"], "moe": model_presets["moe-nano"]}


def compare(placement: str, batch_size: int, rounds: int) -> dict[str, float]:
    """Median tokens/s of both, and the median and quartiles of their ratio within a round."""
    steps = {}
    for name, config in MODELS.items():
        torch.manual_seed(0)
        steps[name] = Steps(LanguageModel(replace(config, placement=find_placement(placement))), batch_size)
    tokens = batch_size * MODELS["dense"].context
    speeds = {name: [tokens / seconds for seconds in values] for name, values in in_turn(steps, rounds).items()}
    medians = {f"{name}_tokens_per_second": statistics.median(values) for name, values in speeds.items()}
    return medians | ratio_summary(speeds["moe"], speeds["dense"])


def main() -> None:
    """Measure and write benchmarks/results/moe_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--placements", nargs="+", default=["sdd", "sdd-paper", "prenorm-qk"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for placement in args.placements:
        for batch_size in args.batch_sizes:
            name = f"{placement}, batch of {batch_size}"
            results[name] = found = compare(placement, batch_size, args.rounds)
            quartiles = f"quartiles {found['lower_quartile']:.3f}, {found['upper_quartile']:.3f}"
            print(f"{name}: {found['median_ratio']:.3f} ({quartiles})", flush=True)
    file = write_result(
        "moe_speed",
        {
            "what": "tokens/s of training steps of moe-nano over those of nano, in turn in one process",
            "active_parameters": {name: count_parameters(config).published_active for name, config in MODELS.items()},
            "rounds": args.rounds,
            "results": results,
        },
    )
    print(f"written to {file}")


if __name__ == "__main__":
    main()
