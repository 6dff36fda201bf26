"""Training steps of lean blocks over those of the equations, on a CPU, in turn: whether leaving norms out pays there.

Both compute the same function (`sdd.models.lean`). On a CPU models run the equations unless this says otherwise.
"""

import argparse
import statistics
from dataclasses import replace

import torch

from _record import write_result
from _steps import Steps, in_turn, ratio_summary
from sdd.models import LanguageModel, ModelConfig, model_presets
from sdd.placement import placements


def compare(config: ModelConfig, rounds: int) -> dict[str, float]:
    """Median seconds of both, and the median and quartiles of their ratio within a round."""
    steps = {}
    for name in ("equations", "lean"):
        torch.manual_seed(0)
        model = LanguageModel(config)
        for block in model.blocks:
            setattr(block, "force_lean", name == "lean")  # noqa: B010
        steps[name] = Steps(model, batch_size=4)
    seconds = in_turn(steps, rounds)
    medians = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    return medians | ratio_summary(seconds["lean"], seconds["equations"])


def main() -> None:
    """Measure and write benchmarks/results/lean_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--presets", nargs="+", default=["nano", "micro"])
    parser.add_argument("--placements", nargs="+", default=["sdd", "sdd-paper", "sdd-released", "sdd-prenorm"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for preset in args.presets:
        for placement in args.placements:
            config = replace(model_presets[preset], placement=placements[placement])
            found = compare(config, args.rounds)
            results[f"{preset}, {placement}"] = found
            quartiles = f"quartiles {found['lower_quartile']:.3f}, {found['upper_quartile']:.3f}"
            print(f"{preset}, {placement}: {found['median_ratio']:.3f} ({quartiles})", flush=True)
    file = write_result(
        "lean_cpu",
        {
            "what": "seconds of training steps of lean blocks over those of the equations, in turn in one process",
            "rounds": args.rounds,
            "threads": args.threads,
            "results": results,
        },
    )
    print(f"written to {file}")


if __name__ == "__main__":
    main()
